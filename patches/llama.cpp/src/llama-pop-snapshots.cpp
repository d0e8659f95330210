// prefill-only pruning: snapshots of the states at the boundary, stored after each ubatch, see llama-pop.h

#include "llama-pop.h"

#include "llama-pop-cells.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <new>

//
// after each ubatch
//

// return the rows' cells, counted over all streams
static std::vector<uint32_t> find_rows(const llama_kv_cache & kv, const llama_ubatch & ubatch) {
    std::vector<uint32_t> res;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id[i][0];
        res.push_back(kv.get_stream(seq_id)*kv.get_size() + llama_pop_find_cell(kv.get_cells(seq_id), seq_id, ubatch.pos[i]));
    }
    return res;
}

static size_t n_states(const llama_hparams & hparams, const llama_kv_cache & kv) {
    return (size_t) hparams.n_embd*kv.get_size()*kv.get_n_stream();
}

void llama_context::pop_finish(const llama_ubatch & ubatch, const llama_memory_context_i * mctx, const llm_graph_result & res) {
    llama_pop_count(pop_counters, cparams, ubatch);
    llama_pop_take_taps(*this, ubatch, mctx, res);

    ggml_tensor * t_states = ggml_graph_get_tensor(res.get_gf(), LLAMA_POP_STATES);
    if (!t_states) {
        return;
    }

    const auto & kv = *llama_pop_get_caches(memory.get()).base;

    const int64_t n_embd  = model.hparams.n_embd;
    const int64_t n_cells = kv.get_size();
    const auto    cells   = find_rows(kv, ubatch);

    auto & snapshots = pop_snapshots;

    if (snapshots.states.empty() || snapshots.boundary != cparams.pop.boundary) {
        snapshots.boundary = cparams.pop.boundary;
        snapshots.states.assign(n_states(model.hparams, kv), 0.0f);
        for (uint32_t s = 0; s < kv.get_n_seq_max(); ++s) {
            auto & flags = kv.get_cells(s).pop_has_snapshot;
            flags.assign(flags.size(), false);
        }
    }

    ggml_backend_t backend = ggml_backend_sched_get_tensor_backend(sched.get(), t_states);

    // one copy for each range of consecutive cells
    for (uint32_t i = 0, n = 0; i < ubatch.n_tokens; i += n) {
        for (n = 1; i + n < ubatch.n_tokens && cells[i + n] == cells[i] + n; ++n) {}
        ggml_backend_tensor_get_async(backend, t_states, snapshots.states.data() + cells[i]*n_embd, i*t_states->nb[1], n*t_states->nb[1]);
    }
    synchronize();

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        kv.get_cells(ubatch.seq_id[i][0]).pop_has_snapshot[cells[i] % n_cells] = true;
    }
}

//
// C ABI
//

int32_t llama_pop_set_snapshots(llama_context * ctx, bool snapshots) {
    const auto & model = ctx->get_model();
    const auto * kv    = llama_pop_get_caches(ctx->get_memory()).base;

    if (snapshots && (ctx->pop().boundary == 0 || !kv)) {
        LLAMA_LOG_ERROR("%s: the model has no boundary, or the context no KV cache\n", __func__);
        return -1;
    }
    if (snapshots && model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        LLAMA_LOG_ERROR("%s: the tensors are split among devices\n", __func__);
        return -1;
    }

    ctx->pop().snapshots = snapshots;
    if (!snapshots) {
        ctx->pop_snapshots = {};
        return 0;
    }

    // allocate now, while an error can be returned, instead of in the middle of a prompt
    try {
        ctx->pop_snapshots.states.reserve(n_states(model.hparams, *kv));
    } catch (const std::bad_alloc &) {
        LLAMA_LOG_ERROR("%s: no memory for the states of %u rows\n", __func__, kv->get_size()*kv->get_n_stream());
        ctx->pop().snapshots = false;
        ctx->pop_snapshots   = {};
        return -1;
    }
    return 0;
}

size_t llama_pop_snapshots_size(const llama_context * ctx) {
    return ctx->pop_snapshots.states.capacity()*sizeof(float);
}
