// Measurement of our kernels and llama.cpp's on this machine, from which pop-local chooses the faster ones.
//
// A kind is a weight type, or attention, with many rows (prefill, GGML_POP_ROWS_ALL) or few (decode, GGML_POP_ROWS_FAST). It has two forms:
//
//   ours       our kernels
//   llama.cpp  llama.cpp's kernels, with weights in file order
//
// A round computes the same operation once in each form. The next round uses the reverse order, so a change of the clock rate favors
// neither form. A kind is measured in two batches of rounds. All other kinds are measured between these
// batches, so a brief disturbance affects only one of them.

#include "fast.h"

#include "ggml-alloc.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <algorithm>
#include <atomic>
#include <cctype>
#include <chrono>
#include <cstdlib>
#include <ctime>
#include <exception>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#if defined(__APPLE__)
#    include <libkern/OSCacheControl.h>
#elif defined(__x86_64__) || defined(_M_X64)
#    include <emmintrin.h>
#endif

namespace fast {

namespace {

// The shapes of three products, whose weights have about the same number of values. The speed depends on the row length: for rows of 4096
// values in the cache, llama.cpp's Q6_K kernels seemed 10 % faster on Zen 4, but they made decoding 2 % slower. More than 8 threads share
// 8 threads' rows.
struct shape {
    int64_t n_in, n_out, n_out_per_thread; // n_out: with few columns, n_out_per_thread: with many
};
constexpr shape   SHAPES[]   = { { 1536, 3584, 224 }, { 4096, 1344, 96 }, { 8960, 608, 32 } };
constexpr int64_t MAX_SHARES = 8;
constexpr int64_t N_COLS     = 64; // a short prompt's
constexpr int64_t HEAD_DIM = 128, HEADS_PER_KV = 4, N_KV_MANY = 512, N_KV_FEW = 2048;
constexpr int64_t CACHE_LINE = 64;
// Quantizing rows is slow, and their values do not affect the time, so all rows repeat the first ones.
constexpr int64_t N_DISTINCT = 4;

using steady = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr size_t       N_ROUNDS = 9; // of a batch
constexpr milliseconds OPENING_LIMIT(1000);
constexpr milliseconds ALL_LIMIT(60000); // all kinds take 2 to 10 s on an idle machine

//
// measurement
//

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

// Microseconds of each round, by form. An unsupported kind has the form "-", and an attempt's time in seconds is stored as "tried".
using times_by_form = std::map<std::string, std::vector<double>>;
using times_by_kind = std::map<std::string, times_by_form>;

constexpr int ATTENTION = -1; // instead of a weight type

struct kind {
    int  type;
    bool has_many;

    // Return the type's name in capitals, as in GGUF's documentation, and the rows: "Q4_K/many".
    std::string name() const {
        std::string found = type == ATTENTION ? "attention" : ggml_type_name((ggml_type) type);
        if (type != ATTENTION) {
            std::transform(found.begin(), found.end(), found.begin(), [](unsigned char c) { return std::toupper(c); });
        }
        return found + (has_many ? "/many" : "/few");
    }
};

// Remove memory from the caches. A model's weights exceed the caches, so each product reads its weights from main memory.
void evict(ggml_backend_buffer_t buffer) {
    char * begin = (char *) ggml_backend_buffer_get_base(buffer), * end = begin + ggml_backend_buffer_get_size(buffer);
#if defined(__APPLE__)
    sys_dcache_flush(begin, end - begin);
#else
    for (char * line = begin; line < end; line += CACHE_LINE) {
#    if defined(__x86_64__) || defined(_M_X64)
        _mm_clflush(line);
#    elif defined(__aarch64__) && defined(__linux__)
        asm volatile("dc civac, %0" : : "r"(line) : "memory"); // Linux permits this instruction in user space
#    endif
    }
#endif
    std::atomic_thread_fence(std::memory_order_seq_cst);
}

// A graph of a kind's operations.
struct form {
    const char *         name;
    ggml_cgraph *        graph;
    ggml_cplan           plan;
    std::vector<uint8_t> work;

    form(const char * name, const tensors & t, const std::vector<ggml_tensor *> & ops, int rows, int n_threads) :
        name(name), graph(ggml_new_graph(t.ctx)) {
        for (ggml_tensor * op : ops) {
            op->op_params[GGML_POP_OP_PARAM] = rows;
            ggml_build_forward_expand(graph, op);
        }
        plan = ggml_graph_plan(graph, n_threads, nullptr);
        work.resize(plan.work_size);
        plan.work_data = work.data();
    }

    double run_us() {
        const auto start = steady::now();
        ggml_graph_compute(graph, &plan);
        return std::chrono::duration<double, std::micro>(steady::now() - start).count();
    }
};

void fill(ggml_tensor * t, std::mt19937 & random) {
    std::normal_distribution<float> normal;
    std::vector<float> values(N_DISTINCT * t->ne[0]);
    std::generate(values.begin(), values.end(), [&] { return normal(random); });
    std::vector<uint8_t> stored(N_DISTINCT * ggml_row_size(t->type, t->ne[0]));
    ggml_quantize_chunk(t->type, values.data(), stored.data(), 0, N_DISTINCT, t->ne[0], nullptr);
    for (size_t at = 0; at < ggml_nbytes(t); at += stored.size()) {
        ggml_backend_tensor_set(t, stored.data(), at, std::min(stored.size(), ggml_nbytes(t) - at));
    }
}

// Measure a batch, and add its times. Stop at the deadline.
void run_rounds(times_by_form & times, form & ours, form & theirs, ggml_backend_buffer_t buffer, steady::time_point deadline) {
    form * forms[] = { &ours, &theirs };
    for (size_t i = 0; i <= N_ROUNDS; i++) {
        for (form * f : forms) {
            if (steady::now() >= deadline) {
                return;
            }
            evict(buffer);
            const double us = f->run_us();
            if (i > 0) { // the first round touches the memory
                times[f->name].push_back(us);
            }
        }
        std::swap(forms[0], forms[1]);
    }
}

// A kind's operations, once for each form.
struct operations {
    ggml_pop_rows rows;
    tensors       all;

    std::vector<ggml_tensor *> ops[2];
    std::vector<ggml_tensor *> inputs; // to fill with random values

    operations(const kind & k, int n_threads) : rows(k.has_many ? GGML_POP_ROWS_ALL : GGML_POP_ROWS_FAST) {
        const int64_t n_shares = std::min<int64_t>(n_threads, MAX_SHARES), n_cols = k.has_many ? N_COLS : 1;
        if (k.type == ATTENTION) {
            add_attention(n_shares, n_cols, k.has_many ? N_KV_MANY : N_KV_FEW);
        } else {
            for (const shape & s : SHAPES) {
                add_product((ggml_type) k.type, s.n_in, k.has_many ? s.n_out_per_thread * n_shares : s.n_out, n_cols);
            }
        }
        // GGML_POP_ROWS_ALL would also find the kernels for floats, which exist for equal results, not for speed.
        ops[0][0]->op_params[GGML_POP_OP_PARAM] = GGML_POP_ROWS_FAST + GGML_POP_ROWS_CHOSEN;
    }

    void add_product(ggml_type type, int64_t n_in, int64_t n_out, int64_t n_cols) {
        ggml_tensor * w = ggml_new_tensor_2d(all.ctx, type, n_in, n_out);
        ggml_tensor * x = ggml_new_tensor_2d(all.ctx, GGML_TYPE_F32, n_in, n_cols);
        inputs.insert(inputs.end(), { w, x });
        for (auto & form : ops) {
            form.push_back(ggml_mul_mat(all.ctx, w, x));
        }
    }

    void add_attention(int64_t n_heads, int64_t n_rows, int64_t n_kv) {
        inputs = { ggml_new_tensor_3d(all.ctx, GGML_TYPE_F32, HEAD_DIM, n_rows, HEADS_PER_KV * n_heads),
                   ggml_new_tensor_3d(all.ctx, GGML_TYPE_F16, HEAD_DIM, n_kv, n_heads),
                   ggml_new_tensor_3d(all.ctx, GGML_TYPE_F16, HEAD_DIM, n_kv, n_heads) };
        ggml_tensor * mask = ggml_new_tensor_2d(all.ctx, GGML_TYPE_F16, n_kv, n_rows); // all zeros
        for (auto & form : ops) {
            form.push_back(ggml_flash_attn_ext(all.ctx, inputs[0], inputs[1], inputs[2], mask, 0.1f, 0.0f, 0.0f));
            ggml_prec_set_acc(form[0], GGML_PREC_F32); // as in llama.cpp's graphs
        }
    }

    bool is_supported() const { return ggml_pop_work_size(1, ops[0][0]) > 0; }

    // Measure a batch. Do nothing if memory cannot be allocated.
    void measure(times_by_form & times, int n_threads, steady::time_point deadline) {
        if (all.allocate(ggml_backend_cpu_buffer_type())) {
            std::mt19937 random(0);
            ggml_backend_buffer_clear(all.buffer, 0);
            for (ggml_tensor * t : inputs) {
                fill(t, random);
            }
            form ours("ours", all, ops[0], rows + GGML_POP_ROWS_CHOSEN, n_threads);
            form theirs("llama.cpp", all, ops[1], GGML_POP_ROWS_NONE, n_threads);
            run_rounds(times, ours, theirs, all.buffer, deadline);
        }
    }
};

times_by_kind measure(const std::vector<kind> & kinds, int n_threads, steady::time_point deadline) {
    times_by_kind found;
    for (int batch = 0; batch < 2; batch++) {
        for (const kind & k : kinds) {
            if (steady::now() < deadline) {
                operations(k, n_threads).measure(found[k.name()], n_threads, deadline);
            }
        }
    }
    return found;
}

// Return whether other processes use this processor for more than half of 20 ms. If so, rounds would take too long.
bool is_crowded() {
    const auto start = steady::now();
    auto now = start;
    steady::duration lost(0);
    while (now - start < milliseconds(20)) {
        const auto before = now;
        now = steady::now();
        if (now - before > std::chrono::microseconds(100)) { // interrupts take less
            lost += now - before;
        }
    }
    return 2 * lost > now - start;
}

//
// choice
//

// Other processes make some rounds slower and none faster. A form therefore counts as faster only if, in each of two batches, it is 5 % faster
// in all rounds but one, and its median is 5 % below the other form's fastest round. tests/unit/engine/test_kernel_choice.py simulates this
// rule.
constexpr double CLEARLY = 1.05;
constexpr size_t MAX_LOST = 1; // rounds of a batch
// On a busy machine, the median was up to 1.01 times the fastest round in half of the batches, and up to 1.16 times in 90 %.
constexpr double MAX_SPREAD = 1.25;

using batch = std::vector<double>;

double median(batch times) {
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

double fastest(const batch & times) {
    return *std::min_element(times.begin(), times.end());
}

std::vector<batch> batches(const times_by_form & times, const char * form) {
    const auto found = times.find(form);
    if (found == times.end() || found->second.size() != 2 * N_ROUNDS) {
        return {};
    }
    const auto begin = found->second.begin();
    return { batch(begin, begin + N_ROUNDS), batch(begin + N_ROUNDS, begin + 2 * N_ROUNDS) };
}

bool is_complete(const times_by_form & times) {
    return times.count("-") || (!batches(times, "ours").empty() && !batches(times, "llama.cpp").empty());
}

// Return false if other processes made many rounds slower.
bool is_calm(const times_by_form & times) {
    for (const char * form : { "ours", "llama.cpp" }) {
        for (const batch & b : batches(times, form)) {
            if (median(b) > MAX_SPREAD * fastest(b)) {
                return false;
            }
        }
    }
    return true;
}

bool wins(const batch & one, const batch & other) {
    size_t n_lost = 0;
    for (size_t i = 0; i < N_ROUNDS; i++) {
        n_lost += one[i] * CLEARLY >= other[i];
    }
    return n_lost <= MAX_LOST && median(one) * CLEARLY < fastest(other);
}

bool is_faster(const times_by_form & times, const char * one, const char * other) {
    const auto a = batches(times, one), b = batches(times, other);
    return !a.empty() && !b.empty() && is_calm(times) && wins(a[0], b[0]) && wins(a[1], b[1]);
}

// The form that computes a kind unless the other one is faster.
const char * default_form() { return ggml_pop_must_be_chosen() ? "llama.cpp" : "ours"; }
const char * other_form()   { return ggml_pop_must_be_chosen() ? "ours" : "llama.cpp"; }

// Return whether `one` is not clearly slower than `other`. Delays by other processes can only make it seem slower.
bool is_as_fast(const batch & one, const batch & other) {
    return median(one) <= CLEARLY * fastest(other);
}

// Return whether another measurement would probably give the same choice.
bool is_decided(const times_by_form & times) {
    const auto a = batches(times, default_form()), b = batches(times, other_form());
    return times.count("-") || is_faster(times, other_form(), default_form()) ||
           (is_complete(times) && is_as_fast(a[0], b[0]) && is_as_fast(a[1], b[1]));
}

// Return the kinds that other_form() computes, after the word "only" if our kernels must be chosen.
std::string choose(const times_by_kind & kinds) {
    std::string choice = ggml_pop_must_be_chosen() ? "only" : "";
    for (const auto & [name, times] : kinds) {
        if (is_faster(times, other_form(), default_form())) {
            choice += (choice.empty() ? "" : " ") + name;
        }
    }
    return choice;
}

// Return a line for each kind: "Q4_K/many: llama.cpp 0.92 ms, ours 0.53 ms (ours: 1.00 times the fastest)".
std::string summary(const times_by_kind & kinds) {
    std::ostringstream text;
    text.precision(2);
    text << std::fixed;
    for (const auto & [name, times] : kinds) {
        if (is_complete(times) && !times.count("-")) {
            const double theirs = median(times.at("llama.cpp")), ours = median(times.at("ours"));
            text << '\n' << name << ": llama.cpp " << theirs / 1000 << " ms, ours " << ours / 1000 << " ms (ours: "
                 << ours / std::max(1.0, std::min(ours, theirs)) << " times the fastest)";
        }
    }
    return text.str();
}

//
// file
//

// While opening models, a kind is measured up to 3 times, and at most once in 10 minutes.
constexpr size_t MAX_ATTEMPTS = 3;
constexpr double RETRY_SECONDS = 600;

// Return whether opening a model must not measure the kind (again).
bool is_settled(const times_by_form & times) {
    const auto tried = times.find("tried");
    if (is_decided(times) || tried == times.end() || tried->second.empty()) {
        return is_decided(times);
    }
    const double seconds = (double) std::time(nullptr) - tried->second.back(); // negative if the clock was set back
    return tried->second.size() >= MAX_ATTEMPTS || (seconds >= 0 && seconds < RETRY_SECONDS);
}

// If a form has several lines, the last one is used. Lines with "tried" are combined.
times_by_kind parse(const std::string & text) {
    times_by_kind found;
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
        std::istringstream words(line);
        std::string name, form;
        words >> name >> form;
        batch & times = found[name][form];
        if (form != "tried") {
            times.clear();
        }
        for (double us; words >> us;) {
            times.push_back(us);
        }
    }
    return found;
}

std::string as_text(const times_by_kind & kinds) {
    std::ostringstream text;
    text.precision(1);
    text << std::fixed;
    for (const auto & [name, forms] : kinds) {
        for (const auto & [form, times] : forms) {
            text << name << ' ' << form;
            for (const double us : times) {
                text << ' ' << us;
            }
            text << '\n';
        }
    }
    return text.str();
}

std::string read_file(const std::filesystem::path & path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

// Write next to the file and rename, so that another process reads either all lines or none. Return false if the file cannot be written.
bool write_file(const std::filesystem::path & path, const std::string & text) {
    std::error_code error;
    std::filesystem::create_directories(path.parent_path(), error);
    auto temporary = path;
    temporary += '.' + std::to_string(steady::now().time_since_epoch().count()); // unlike another process's
    std::ofstream file(temporary, std::ios::binary);
    file << text;
    file.close();
    if (file) {
        std::filesystem::rename(temporary, path, error);
    }
    const bool is_written = file && !error;
    std::filesystem::remove(temporary, error);
    return is_written;
}

// Add lines to the file, which another process may have changed. Return false if the file cannot be written.
bool add_to_file(const std::filesystem::path & path, const times_by_kind & kinds) {
    std::string text = read_file(path);
    if (!text.empty() && text.back() != '\n') {
        text += '\n';
    }
    return write_file(path, text + as_text(kinds));
}

std::vector<kind> kinds_of(const std::string & words, bool has_many) {
    std::vector<kind> found;
    std::istringstream all(words);
    for (std::string word; all >> word;) {
        const int type = word == "attention" ? ATTENTION : atoi(word.c_str());
        if (type == ATTENTION || (type >= 0 && type < GGML_TYPE_COUNT && ggml_blck_size((ggml_type) type) > 0)) { // ggml removed some types
            if (has_many) {
                found.push_back({ type, true });
            }
            found.push_back({ type, false });
        }
    }
    return found;
}

// Remove the kinds that our kernels do not support, and return them.
times_by_kind take_unsupported(std::vector<kind> & kinds) {
    times_by_kind found;
    const auto first = std::stable_partition(kinds.begin(), kinds.end(), [](const kind & k) { return operations(k, 1).is_supported(); });
    for (auto k = first; k != kinds.end(); k++) {
        found[k->name()]["-"];
    }
    kinds.erase(first, kinds.end());
    return found;
}

times_by_kind measure_all(int n_threads, const std::filesystem::path & path) {
    std::string words = "attention";
    for (int type = 0; type < GGML_TYPE_COUNT; type++) {
        words += ' ' + std::to_string(type);
    }
    auto kinds = kinds_of(words, true);
    auto found = take_unsupported(kinds);
    found.merge(measure(kinds, n_threads, steady::now() + ALL_LIMIT));
    write_file(path, as_text(found));
    return found;
}

// Measure the kinds that are not settled. An attempt is stored first, so nothing is measured without permission to write.
times_by_kind measure_missing(int n_threads, std::vector<kind> kinds, const std::filesystem::path & path) {
    const auto deadline = steady::now() + OPENING_LIMIT;
    auto known = parse(read_file(path));
    kinds.erase(std::remove_if(kinds.begin(), kinds.end(), [&](const kind & k) { return is_settled(known[k.name()]); }), kinds.end());
    auto found = take_unsupported(kinds);
    for (const kind & k : kinds) {
        found[k.name()]["tried"] = batch(1, (double) std::time(nullptr));
    }
    if (found.empty() || !add_to_file(path, found) || kinds.empty() || is_crowded()) {
        return known;
    }
    found = measure(kinds, n_threads, deadline);
    for (auto i = found.begin(); i != found.end();) {
        i = is_decided(i->second) ? std::next(i) : found.erase(i);
    }
    add_to_file(path, found);
    return parse(read_file(path));
}

std::string choose(int n_threads, const std::string & words, const std::filesystem::path & path) {
    if (!operations({ GGML_TYPE_Q8_0, true }, n_threads).is_supported()) { // we have no kernels for this processor
        return "";
    }
    // With many rows, llama.cpp's results depend on the number of rows. If its kernels replaced ours, a prompt's results
    // would depend on its batches, so only the user's request (all) measures these kinds. If ours replace llama.cpp's, no guarantee is lost.
    const bool has_many = ggml_pop_must_be_chosen();
    const auto known = words == "all" ? measure_all(n_threads, path) : measure_missing(n_threads, kinds_of(words, has_many), path);
    return choose(known) + summary(known);
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
