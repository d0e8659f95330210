// Measurement of our kernels and llama.cpp's on this machine, from which pop-local chooses the faster ones.
//
// A kind is a weight type, or attention, with many rows (prefill, GGML_POP_ROWS_ALL) or few (decode, GGML_POP_ROWS_FAST). Each round
// computes the same operation once in each form:
//
//   ours       our kernels
//   llama.cpp  llama.cpp's kernels, with weights in file order
//
// Rounds are paired and alternate the order of the forms, so a change of the clock rate does not favor a form.

#include "fast.h"

#include "ggml-alloc.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace fast {

namespace {

// Weights have the width of a 7B model's layer. With few columns, 9 to 18 MB exceed most L2 and many L3 caches, as a model's layers do.
// With many columns, 256 rows per thread take milliseconds. The memory is bounded: more than 8 threads share 8 threads' rows.
constexpr int64_t N_IN = 4096, N_OUT = 4096, N_OUT_PER_THREAD = 256, MAX_SHARES = 8;
constexpr int64_t N_COLS = 64; // a short prompt's
constexpr int64_t HEAD_DIM = 128, HEADS_PER_KV = 4, N_KV_MANY = 512, N_KV_FEW = 2048;
constexpr int     MIN_ROUNDS = 9, MAX_ROUNDS = 25;
constexpr double  MAX_SECONDS  = 1.2;  // a type that started before may take 0.2 s longer on a slow processor
constexpr double  KIND_SECONDS = 0.06; // for rounds after the first MIN_ROUNDS
// Quantizing rows is slow, and their values do not affect the time, so all rows repeat the first ones.
constexpr int64_t N_DISTINCT = 4;

using steady = std::chrono::steady_clock;

double seconds_since(steady::time_point start) {
    return std::chrono::duration<double>(steady::now() - start).count();
}

// A ggml context and the buffer of its tensors.
struct tensors {
    ggml_context *        ctx;
    ggml_backend_buffer_t buffer = nullptr;

    tensors() : ctx(ggml_init({ 64 * ggml_tensor_overhead() + 4 * ggml_graph_overhead(), nullptr, true })) {}

    ~tensors() {
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
    }

    tensors(const tensors &) = delete;
    tensors & operator=(const tensors &) = delete;

    bool allocate(ggml_backend_buffer_type_t type) {
        buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, type);
        return buffer;
    }
};

// A graph of one operation, and its times in microseconds.
struct form {
    const char *         name;
    ggml_cgraph *        graph;
    ggml_cplan           plan;
    std::vector<uint8_t> work;
    std::vector<double>  times;

    form(const char * name, const tensors & t, ggml_tensor * op, ggml_pop_rows rows, int n_threads) :
        name(name), graph(ggml_new_graph(t.ctx)) {
        op->op_params[GGML_POP_OP_PARAM] = rows;
        ggml_build_forward_expand(graph, op);
        plan = ggml_graph_plan(graph, n_threads, nullptr);
        work.resize(plan.work_size);
        plan.work_data = work.data();
    }

    double run() {
        const auto start = steady::now();
        ggml_graph_compute(graph, &plan);
        return 1e6 * seconds_since(start);
    }
};

void fill(ggml_tensor * t, std::mt19937 & random) {
    std::normal_distribution<float> normal;
    std::vector<float> values(ggml_nelements(t));
    std::generate(values.begin(), values.end(), [&] { return normal(random); });
    std::vector<uint8_t> stored(ggml_nbytes(t));
    ggml_quantize_chunk(t->type, values.data(), stored.data(), 0, 1, values.size(), nullptr);
    ggml_backend_tensor_set(t, stored.data(), 0, stored.size());
}

std::vector<uint8_t> make_weights(ggml_type type, int64_t n_rows, std::mt19937 & random) {
    std::normal_distribution<float> normal;
    std::vector<float> values(N_DISTINCT * N_IN);
    std::generate(values.begin(), values.end(), [&] { return normal(random); });
    const size_t some = N_DISTINCT * ggml_row_size(type, N_IN);
    std::vector<uint8_t> stored(n_rows / N_DISTINCT * some);
    ggml_quantize_chunk(type, values.data(), stored.data(), 0, N_DISTINCT, N_IN, nullptr);
    for (size_t at = some; at < stored.size(); at += some) {
        memcpy(stored.data() + at, stored.data(), some);
    }
    return stored;
}

void run_rounds(std::vector<form> & forms, double seconds) {
    for (form & f : forms) {
        f.run(); // touches the memory
    }
    const auto start = steady::now();
    for (int i = 0; i < MAX_ROUNDS && (i < MIN_ROUNDS || seconds_since(start) < seconds); i++) {
        for (form & f : forms) {
            f.times.push_back(f.run());
        }
        std::reverse(forms.begin(), forms.end());
    }
}

std::vector<form> measure_product(ggml_type type, bool has_many, int n_threads, double seconds) {
    const int64_t n_out = has_many ? N_OUT_PER_THREAD * std::min<int64_t>(n_threads, MAX_SHARES) : N_OUT;
    const ggml_pop_rows rows = has_many ? GGML_POP_ROWS_ALL : GGML_POP_ROWS_FAST;
    std::mt19937 random(0);
    tensors all;
    ggml_tensor * w = ggml_new_tensor_2d(all.ctx, type, N_IN, n_out);
    ggml_tensor * x = ggml_new_tensor_2d(all.ctx, GGML_TYPE_F32, N_IN, has_many ? N_COLS : 1);
    ggml_tensor * ops[] = { ggml_mul_mat(all.ctx, w, x), ggml_mul_mat(all.ctx, w, x) };
    // GGML_POP_ROWS_ALL would also find the kernels for floats, which exist for equal results, not for speed.
    ops[0]->op_params[GGML_POP_OP_PARAM] = GGML_POP_ROWS_FAST;
    if (ggml_pop_work_size(1, ops[0]) == 0 || !all.allocate(ggml_backend_cpu_buffer_type())) {
        return {};
    }
    const auto stored = make_weights(type, n_out, random);
    ggml_backend_tensor_set(w, stored.data(), 0, stored.size());
    fill(x, random);
    std::vector<form> forms;
    forms.emplace_back("ours", all, ops[0], rows, n_threads);
    forms.emplace_back("llama.cpp", all, ops[1], GGML_POP_ROWS_NONE, n_threads);
    run_rounds(forms, seconds);
    return forms;
}

std::vector<form> measure_attention(bool has_many, int n_threads, double seconds) {
    const int64_t n_heads = std::min<int64_t>(n_threads, MAX_SHARES), n_kv = has_many ? N_KV_MANY : N_KV_FEW;
    const int64_t n_rows = has_many ? N_COLS : 1;
    const ggml_pop_rows rows = has_many ? GGML_POP_ROWS_ALL : GGML_POP_ROWS_FAST;
    std::mt19937 random(0);
    tensors all;
    ggml_tensor * q = ggml_new_tensor_3d(all.ctx, GGML_TYPE_F32, HEAD_DIM, n_rows, HEADS_PER_KV * n_heads);
    ggml_tensor * k = ggml_new_tensor_3d(all.ctx, GGML_TYPE_F16, HEAD_DIM, n_kv, n_heads);
    ggml_tensor * v = ggml_new_tensor_3d(all.ctx, GGML_TYPE_F16, HEAD_DIM, n_kv, n_heads);
    ggml_tensor * mask = ggml_new_tensor_2d(all.ctx, GGML_TYPE_F16, n_kv, n_rows);
    ggml_tensor * ops[2];
    for (ggml_tensor *& op : ops) {
        op = ggml_flash_attn_ext(all.ctx, q, k, v, mask, 0.1f, 0.0f, 0.0f);
        ggml_prec_set_acc(op, GGML_PREC_F32); // as in llama.cpp's graphs
    }
    ops[0]->op_params[GGML_POP_OP_PARAM] = rows;
    if (ggml_pop_work_size(1, ops[0]) == 0 || !all.allocate(ggml_backend_cpu_buffer_type())) {
        return {};
    }
    for (ggml_tensor * t : { q, k, v }) {
        fill(t, random);
    }
    ggml_backend_tensor_memset(mask, 0, 0, ggml_nbytes(mask));
    std::vector<form> forms;
    forms.emplace_back("ours", all, ops[0], rows, n_threads);
    forms.emplace_back("llama.cpp", all, ops[1], GGML_POP_ROWS_NONE, n_threads);
    run_rounds(forms, seconds);
    return forms;
}

// Return the name of a kind: "attention", or for a weight type's number its name in capitals, as in GGUF's documentation.
std::string name_of(const std::string & word) {
    const int type = atoi(word.c_str());
    const char * name = word == "attention" || type >= GGML_TYPE_COUNT ? nullptr : ggml_type_name((ggml_type) type);
    std::string found = name ? name : "";
    std::transform(found.begin(), found.end(), found.begin(), [](unsigned char c) { return std::toupper(c); });
    return found.empty() ? word : found;
}

// Add a line for each form: the kind, the form, and the microseconds of each round. A kind without forms has a line, too.
void append(std::ostringstream & text, const std::string & kind, const std::vector<form> & forms) {
    if (forms.empty()) {
        text << kind << " -\n";
    }
    for (const form & f : forms) {
        text << kind << ' ' << f.name;
        for (const double us : f.times) {
            text << ' ' << (int64_t) (us + 0.5);
        }
        text << '\n';
    }
}

// Measure "attention", or the weight type with the given number. Unknown words have no times.
void measure(std::ostringstream & text, const std::string & word, int n_threads) {
    const int type = word == "attention" ? -1 : atoi(word.c_str());
    if (type >= GGML_TYPE_COUNT || (type >= 0 && ggml_blck_size((ggml_type) type) == 0)) { // types that ggml removed
        return;
    }
    for (const bool has_many : { true, false }) {
        append(text, name_of(word) + (has_many ? "/many" : "/few"), type < 0 ? measure_attention(has_many, n_threads, KIND_SECONDS) :
            measure_product((ggml_type) type, has_many, n_threads, KIND_SECONDS));
    }
}

//
// choice
//

// Other processes make some rounds slower and none faster. So a form is faster than another only if its median is 5 % below the other's
// fastest round.
constexpr double CLEARLY = 1.05;

using times_by_form = std::map<std::string, std::vector<double>>;

double median(std::vector<double> times) {
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

bool is_faster(const times_by_form & forms, const std::string & one, const std::string & other) {
    const auto a = forms.find(one), b = forms.find(other);
    return a != forms.end() && b != forms.end() && !a->second.empty() && !b->second.empty() &&
           median(a->second) * CLEARLY < *std::min_element(b->second.begin(), b->second.end());
}

// The timings by weight type (or attention), and by rows.
using times_by_kind = std::map<std::string, std::map<std::string, times_by_form>>;

times_by_kind parse(const std::string & timings) {
    times_by_kind found;
    std::istringstream lines(timings);
    for (std::string line; std::getline(lines, line);) {
        std::istringstream words(line);
        std::string kind, form;
        words >> kind >> form;
        const size_t end = std::min(kind.find('/'), kind.size());
        std::vector<double> & times = found[kind.substr(0, end)][kind.substr(end)][form];
        for (double us; words >> us;) {
            times.push_back(us);
        }
    }
    return found;
}

// Return the kinds that llama.cpp computes.
std::string choose(times_by_kind & kinds) {
    std::string choice;
    for (auto & [name, rows] : kinds) {
        for (auto & [suffix, forms] : rows) {
            choice += is_faster(forms, "llama.cpp", "ours") ? name + suffix + ' ' : "";
        }
    }
    return choice.substr(0, choice.find_last_not_of(' ') + 1);
}

// Return a line for each kind: "Q4_K/many: llama.cpp 0.92 ms, ours 0.53 ms (ours: 1.00 times the fastest)".
std::string summary(times_by_kind & kinds) {
    std::ostringstream text;
    text.precision(2);
    text << std::fixed;
    for (auto & [name, rows] : kinds) {
        for (auto & [suffix, forms] : rows) {
            if (forms.count("ours") == 0 || forms["ours"].empty()) {
                continue;
            }
            text << '\n' << name << suffix << ": ";
            double fastest = median(forms["ours"]);
            for (auto & [form, times] : forms) {
                if (!times.empty()) {
                    text << form << ' ' << median(times) / 1000 << " ms" << (form == forms.rbegin()->first ? "" : ", ");
                    fastest = std::min(fastest, median(times));
                }
            }
            text << " (ours: " << median(forms["ours"]) / std::max(1.0, fastest) << " times the fastest)";
        }
    }
    return text.str();
}

//
// file
//

std::string read_file(const std::filesystem::path & path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

// Write next to the file and rename, so that another process reads either all lines or none. Without permission, store nothing.
void write_file(const std::filesystem::path & path, const std::string & text) {
    std::error_code ignored;
    std::filesystem::create_directories(path.parent_path(), ignored);
    auto temporary = path;
    temporary += '.' + std::to_string(steady::now().time_since_epoch().count()); // unlike another process's
    std::ofstream file(temporary, std::ios::binary);
    file << text;
    file.close();
    if (file) {
        std::filesystem::rename(temporary, path, ignored);
    }
    std::filesystem::remove(temporary, ignored);
}

std::string all_kinds() {
    std::string kinds = "attention";
    for (int type = 0; type < GGML_TYPE_COUNT; type++) {
        kinds += ' ' + std::to_string(type);
    }
    return kinds;
}

std::string choose(int n_threads, const std::string & kinds, const std::filesystem::path & path) {
    const bool is_all = kinds == "all";
    const std::string stored = '\n' + (is_all ? "" : read_file(path));
    std::istringstream words(is_all ? all_kinds() : kinds);
    std::ostringstream found;
    const auto start = steady::now();
    for (std::string word; words >> word && (is_all || seconds_since(start) < MAX_SECONDS);) {
        if (stored.find('\n' + name_of(word) + "/few ") == std::string::npos) { // the last line of the type
            measure(found, word, n_threads);
        }
    }
    std::string timings = stored.substr(1);
    if (!found.str().empty()) {
        timings += (timings.empty() || timings.back() == '\n' ? "" : "\n") + found.str();
        write_file(path, timings);
    }
    auto times = parse(timings);
    return choose(times) + summary(times);
}

} // namespace

} // namespace fast

const char * ggml_pop_choose(int n_threads, const char * kinds, const char * path) {
    static thread_local std::string found;
    try {
        found = fast::choose(n_threads, kinds, std::filesystem::u8path(path));
    } catch (const std::exception & error) { // such as a lack of memory
        GGML_LOG_WARN("%s: %s\n", __func__, error.what());
        found.clear();
    }
    return found.c_str();
}
