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

#include "measure.h"

#include "fast.h"

#include "ggml-alloc.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <algorithm>
#include <atomic>
#include <cctype>
#include <chrono>
#include <random>
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

} // namespace

std::string kind::name() const {
    std::string found = type == ATTENTION ? "attention" : ggml_type_name((ggml_type) type);
    if (type != ATTENTION) {
        std::transform(found.begin(), found.end(), found.begin(), [](unsigned char c) { return std::toupper(c); });
    }
    return found + (has_many ? "/many" : "/few");
}

bool is_supported(const kind & k) {
    return operations(k, 1).is_supported();
}

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

bool is_crowded() {
    const auto start = steady::now();
    auto now = start;
    steady::duration lost(0);
    while (now - start < std::chrono::milliseconds(20)) {
        const auto before = now;
        now = steady::now();
        if (now - before > std::chrono::microseconds(100)) { // interrupts take less
            lost += now - before;
        }
    }
    return 2 * lost > now - start;
}

} // namespace fast
