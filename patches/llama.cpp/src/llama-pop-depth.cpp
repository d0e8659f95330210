// prefill-only pruning: deep passes from snapshots, see llama-pop.h

#include "llama-pop.h"

#include "llama-pop-cells.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>

//
// cells
//

// return the index of the position's snapshot, -1: none
static int64_t find_state(const llama_kv_cache & kv, llama_seq_id seq_id, llama_pos pos) {
    const auto & cells = kv.get_cells(seq_id);

    const int64_t cell = llama_pop_find_cell(cells, seq_id, pos);
    return cell >= 0 && cells.pop_has_snapshot[cell] ? (int64_t) kv.get_stream(seq_id)*kv.get_size() + cell : -1;
}

//
// deep pass
//

// makes graphs deep passes within its scope
struct deep_pass_scope {
    deep_pass_scope(llama_pop_cparams & pop, const float * states) : pop(pop) {
        pop.is_deep_pass = true;
        pop.states    = states;
    }

    ~deep_pass_scope() {
        pop.is_deep_pass = false;
        pop.states    = nullptr;
    }

    llama_pop_cparams & pop;
};

// tokens: one per row, for architectures that add token features after the boundary. fewer than n if some rows have no token
static llama_ubatch make_ubatch(llama_seq_id seq_id, const llama_pos * pos, int32_t n, bool logits, std::vector<llama_token> tokens, int64_t n_embd_inp) {
    auto data = std::make_shared<llama_ubatch::data_t>();

    data->pos.assign(pos, pos + n);
    data->seq_id_data = { seq_id };
    data->seq_id_unq  = { seq_id };
    data->n_seq_id.assign(n, 1);
    data->seq_id  .assign(n, data->seq_id_data.data());
    data->seq_idx .assign(LLAMA_MAX_SEQ, -1);
    data->output  .assign(n, 0);

    if ((int32_t) tokens.size() == n) {
        data->token = std::move(tokens);
    } else {
        data->embd.assign(n*n_embd_inp, 0.0f);
    }

    data->seq_idx[seq_id]  = 0;
    data->output.back()    = logits;

    llama_ubatch res;

    // marked as one sequence, so that allow_reuse() compares sequences: another one's K/V are in other cells
    res.b_equal_seqs = true;
    res.n_tokens     = n;
    res.n_seq_tokens = n;
    res.n_seqs       = 1;
    res.n_seqs_unq   = 1;
    res.n_pos        = 1;
    res.token        = data->token.empty() ? nullptr : data->token.data();
    res.embd         = data->embd .empty() ? nullptr : data->embd .data();
    res.pos          = data->pos.data();
    res.n_seq_id     = data->n_seq_id.data();
    res.seq_id       = data->seq_id.data();
    res.seq_id_unq   = data->seq_id_unq.data();
    res.seq_idx      = data->seq_idx.data();
    res.output       = data->output.data();
    res.data         = std::move(data);

    return res;
}

// return the reason why the pass is impossible, empty if it is possible
static std::string find_obstacle(llama_context & ctx, const llama_pop_caches & kv, const llama_pop_snapshots & snapshots, llama_seq_id seq_id, const llama_pos * pos, int32_t n) {
    const auto & cparams = ctx.get_cparams();
    const auto & pop     = cparams.pop;

    if (!pop.snapshots || pop.boundary == 0) {
        return "there are no snapshots, see llama_pop_set_snapshots()";
    }
    if (n < 1 || n > (int32_t) cparams.n_ubatch) {
        return format("%d rows, expected 1 to %u (n_ubatch)", n, cparams.n_ubatch);
    }
    if (seq_id < 0 || seq_id >= (llama_seq_id) kv.base->get_n_seq_max()) {
        return format("there is no sequence %d", seq_id);
    }
    if (ctx.get_model().hparams.n_pos_per_embd() > 1) {
        return "rows of this model have several positions each";
    }
    if (llama_pop_reads_all(cparams) || !cparams.causal_attn) {
        return "the context returns states of rows, or its rows attend to later ones";
    }
    if (!std::is_sorted(pos, pos + n, std::less_equal<>())) {
        return "the positions are not ascending";
    }
    for (int32_t i = 0; i < n; ++i) {
        if (snapshots.states.empty() || snapshots.boundary != pop.boundary || find_state(*kv.base, seq_id, pos[i]) < 0) {
            return format("position %d has no snapshot", pos[i]);
        }
    }
    if (kv.swa) {
        const llama_pos first = std::max<int64_t>(0, (int64_t) pos[0] - ctx.get_model().hparams.n_swa + 1);
        const auto & cells = kv.swa->get_cells(seq_id);
        if (cells.seq_pos_min(seq_id) > std::max(first, kv.base->get_cells(seq_id).seq_pos_min(seq_id)) || llama_pop_find_slot(*kv.swa, seq_id, pos, n).empty()) {
            return "layers with a sliding window have evicted rows that these attend to, open the context with swa_full";
        }
    }
    return "";
}

int32_t llama_context::pop_run_deep(llama_seq_id seq_id, const llama_pos * pos, int32_t n, bool with_logits) {
    const auto kv = llama_pop_get_caches(memory.get());

    const auto obstacle = kv.base ? find_obstacle(*this, kv, pop_snapshots, seq_id, pos, n) : "the memory is not a KV cache";
    if (!obstacle.empty() || (with_logits && !sampling.samplers.empty())) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, obstacle.empty() ? "samplers of the backend are not supported" : obstacle.c_str());
        return LLAMA_POP_DEEP_REFUSED;
    }

    synchronize();
    sched_reserve();
    memory_update(false);

    const int64_t n_embd = model.hparams.n_embd;

    std::vector<float>       states;
    std::vector<llama_token> tokens;
    for (int32_t i = 0; i < n; ++i) {
        const float * state = pop_snapshots.states.data() + find_state(*kv.base, seq_id, pos[i])*n_embd;
        states.insert(states.end(), state, state + n_embd);

        const auto & cells = kv.base->get_cells(seq_id);
        const auto   token = cells.ext_get(llama_pop_find_cell(cells, seq_id, pos[i])).tok;
        if (token != LLAMA_TOKEN_NULL) {
            tokens.push_back(token);
        }
    }

    const auto ubatch = make_ubatch(seq_id, pos, n, with_logits, std::move(tokens), model.hparams.n_embd_inp());

    llama_pop_places places;
    places.base      = llama_pop_find_slot(*kv.base, seq_id, pos, n);
    places.n_kv_base = llama_pop_count_cells(kv.base->get_cells(seq_id), places.base.idxs[0].back());
    if (kv.swa) {
        places.swa      = llama_pop_find_slot(*kv.swa, seq_id, pos, n);
        places.n_kv_swa = llama_pop_count_cells(kv.swa->get_cells(seq_id), places.swa.idxs[0].back());
    }

    const auto mctx = llama_pop_use_places(memory.get(), places, ubatch);

    const llama_pop_in_place in_place(memory.get(), places);
    const deep_pass_scope    guard(cparams.pop, states.data());

    // without logits, those of the last batch stay valid
    const int32_t n_outputs_before = n_outputs;

    if (with_logits && output_reserve(1) < 1) {
        return LLAMA_POP_DEEP_FAILED;
    }

    n_outputs = with_logits;

    ggml_status status;
    const auto * res = process_ubatch(ubatch, LLM_GRAPH_TYPE_DEFAULT, mctx.get(), status);

    if (!with_logits || !res) {
        n_outputs = with_logits ? 0 : n_outputs_before;
    }
    if (!res) {
        return status == GGML_STATUS_ABORTED ? LLAMA_POP_DEEP_ABORTED : LLAMA_POP_DEEP_FAILED;
    }

    if (with_logits) {
        output_swaps.clear();
        output_ids[n - 1] = 0;

        ggml_tensor * t_logits = res->get_logits();
        ggml_backend_tensor_get_async(ggml_backend_sched_get_tensor_backend(sched.get(), t_logits), t_logits, logits.data, 0, ggml_nbytes(t_logits));
    }

    // callers measure the time, or let another thread wait, so the pass must be complete on return
    synchronize();

    return LLAMA_POP_DEEP_DONE;
}

int32_t llama_pop_run_deep(llama_context * ctx, llama_seq_id seq_id, const llama_pos * pos, int32_t n, bool logits) {
    return ctx->pop_run_deep(seq_id, pos, n, logits);
}
