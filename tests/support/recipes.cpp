// Write tiny random models of all architectures as GGUF files, with the recipes of llama.cpp's own test.
//
// recipes list                                             print a line for each: its architecture, "dense" or "moe"
// recipes make ARCH KIND LAYERS SEED FILE [KEY=VALUE]...   write a model with additional keys: an integer, a number
//                                                          with a point, or a list of numbers or of true and false

#include <cstdint>

// support/recipes.py replaces upstream's number of layers with this
static uint32_t pop_n_layer = 2;

#define main static upstream_main
#include "test-llama-archs.cpp"
#undef main

#include <algorithm>
#include <cstdlib>
#include <map>
#include <sstream>

struct made_tensor {
    ggml_type            type;
    int64_t              ne[GGML_MAX_DIMS];
    std::vector<uint8_t> data;
};

struct made_model {
    tensor_data_params                 params;
    std::map<std::string, made_tensor> tensors;
};

static void fill_and_keep(ggml_tensor * tensor, void * userdata) {
    auto & made = *(made_model *) userdata;
    set_tensor_data(tensor, &made.params);

    made_tensor & copy = made.tensors[ggml_get_name(tensor)];
    copy.type = tensor->type;
    copy.data.resize(ggml_nbytes(tensor));
    std::copy(tensor->ne, tensor->ne + GGML_MAX_DIMS, copy.ne);
    ggml_backend_tensor_get(tensor, copy.data.data(), 0, copy.data.size());
}

// upstream's saver does not support all architectures; a file needs only the keys that the model was built from
static bool write_file(const gguf_context * keys, made_model & made, const char * path) {
    ggml_context_ptr ctx(ggml_init({ (made.tensors.size() + 1)*ggml_tensor_overhead(), nullptr, true }));
    gguf_context_ptr file(gguf_init_empty());
    gguf_set_kv(file.get(), keys);
    for (auto & [name, copy] : made.tensors) {
        ggml_tensor * tensor = ggml_new_tensor(ctx.get(), copy.type, GGML_MAX_DIMS, copy.ne);
        ggml_set_name(tensor, name.c_str());
        tensor->data = copy.data.data();
        gguf_add_tensor(file.get(), tensor);
    }
    return gguf_write_to_file(file.get(), path, false);
}

template <typename T>
static void set_array(gguf_context * keys, const char * name, gguf_type type, const std::vector<double> & numbers) {
    const std::vector<T> values(numbers.begin(), numbers.end());
    gguf_set_arr_data(keys, name, type, values.data(), values.size());
}

static void add_key(gguf_context * keys, const std::string & arch, const std::string & text) {
    const size_t equals = text.find('=');
    const std::string name  = (text.rfind("tokenizer.", 0) == 0 ? "" : arch + ".") + text.substr(0, equals);
    const std::string value = text.substr(equals + 1);

    std::vector<double> numbers;
    std::istringstream items(value);
    for (std::string item; std::getline(items, item, ','); ) {
        numbers.push_back(item == "true" ? 1 : item == "false" ? 0 : std::stod(item));
    }
    const bool is_float = value.find('.') != std::string::npos;
    if (numbers.size() == 1) {
        is_float ? gguf_set_val_f32(keys, name.c_str(), numbers[0]) : gguf_set_val_u32(keys, name.c_str(), numbers[0]);
    } else if (is_float) {
        set_array<float>(keys, name.c_str(), GGUF_TYPE_FLOAT32, numbers);
    } else if (value.find('e') != std::string::npos) {
        set_array<int8_t>(keys, name.c_str(), GGUF_TYPE_BOOL, numbers);
    } else {
        set_array<uint32_t>(keys, name.c_str(), GGUF_TYPE_UINT32, numbers);
    }
}

static bool make(const std::string & name, bool moe, size_t seed, const char * path, const std::vector<std::string> & more) {
    gguf_context_ptr keys = get_gguf_ctx(llm_arch_from_string(name), moe);
    for (const std::string & key : more) {
        add_key(keys.get(), name, key);
    }

    ggml_backend_dev_t devices[1] = { nullptr };
    llama_model_params params = llama_model_default_params();
    params.devices = devices;

    made_model made = { { seed, 0.1f }, {} };
    llama_model_ptr model(llama_model_init_from_user(keys.get(), fill_and_keep, &made, params));
    return model && write_file(keys.get(), made, path);
}

static void list() {
    for (const llm_arch arch : llm_arch_all()) {
        for (const bool moe : { false, true }) {
            if (arch != LLM_ARCH_UNKNOWN && (moe ? moe_implemented(arch) : !moe_mandatory(arch))) {
                printf("%s %s\n", llm_arch_name(arch), moe ? "moe" : "dense");
            }
        }
    }
}

int main(int argc, char ** argv) {
    const std::vector<std::string> args(argv + 1, argv + argc);
    if (args.size() == 1 && args[0] == "list") {
        list();
        return 0;
    }
    if (args.size() < 6 || args[0] != "make") {
        return 2;
    }
    pop_n_layer = std::stoul(args[3]);
    return make(args[1], args[2] == "moe", std::stoull(args[4]), args[5].c_str(), { args.begin() + 6, args.end() }) ? 0 : 1;
}
