// Calls ggml's functions for tests/support/arm.py, which runs on another processor.
//
//     arm_server FOLDER
//
// ggml selects and loads one of FOLDER's CPU libraries. The program prints the library's name, then reads commands from stdin, one a line:
//
//   find NAME             return the address of a function
//   call ADDRESS ARGS     return x0. ARGS: integers, and 32-bit floats as f and their bits. The first eight integers are passed in registers
//   read ADDRESS N        return N bytes
//   write ADDRESS N       followed by N bytes
//
// During a call, ggml's abort callback prints "callback" and serves commands until "return".

#include "ggml-backend.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <filesystem>
#include <sstream>
#include <string>
#include <vector>

using word = uint64_t;
// The ABI counts integers and floats separately, so their order does not matter.
using function = word (*)(word, word, word, word, word, word, word, word, word, word, float, float, float);

static void * cpu_library = nullptr;

static void serve();

static bool abort_callback(void *) {
    puts("callback");
    serve();
    return false;
}

static word find(const std::string & name) {
    if (name == "abort_callback") {
        return (word) abort_callback;
    }
    void * found = dlsym(cpu_library, name.c_str());
    return (word) (found ? found : dlsym(RTLD_DEFAULT, name.c_str()));
}

static word call(std::istringstream & arguments) {
    word  integers[10] = {};
    float floats[3] = {};
    int   n_integers = 0, n_floats = 0;
    word  address;
    arguments >> address;
    for (std::string each; arguments >> each;) {
        if (each[0] == 'f') {
            const uint32_t bits = (uint32_t) std::stoul(each.substr(1));
            memcpy(floats + n_floats++, &bits, sizeof(bits));
        } else {
            integers[n_integers++] = (word) std::stoll(each);
        }
    }
    const word * i = integers;
    return ((function) address)(i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], floats[0], floats[1], floats[2]);
}

static void serve() {
    fflush(stdout);
    char * line = nullptr;
    size_t size = 0;
    while (getline(&line, &size, stdin) > 0) {
        std::istringstream words(line);
        std::string        command;
        words >> command;
        if (command == "return") {
            break;
        }
        if (command == "find") {
            std::string name;
            words >> name;
            printf("%llu\n", (unsigned long long) find(name));
        } else if (command == "call") {
            printf("%llu\n", (unsigned long long) call(words));
        } else {
            word address, n;
            words >> address >> n;
            const bool is_read = command == "read";
            const size_t done = is_read ? fwrite((void *) address, 1, n, stdout) : fread((void *) address, 1, n, stdin);
            if (done != n) {
                exit(1);
            }
        }
        fflush(stdout);
    }
    free(line);
}

int main(int argc, char ** argv) {
    if (argc != 2) {
        fputs("usage: arm_server FOLDER\n", stderr);
        return 2;
    }
    ggml_backend_load_all_from_path(argv[1]);
    // ggml opens all variants to compare them, and some stay in memory. Only the one that it registered counts.
    const auto cpu = ggml_backend_reg_by_name("CPU");
    void *     function = cpu ? ggml_backend_reg_get_proc_address(cpu, "ggml_pop_kernels") : nullptr;
    Dl_info    info;
    if (function && dladdr(function, &info)) {
        cpu_library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
        puts(std::filesystem::path(info.dli_fname).filename().c_str());
    }
    if (!cpu_library) {
        fprintf(stderr, "ggml loaded no CPU library from %s\n", argv[1]);
        return 1;
    }
    serve();
    return 0;
}
