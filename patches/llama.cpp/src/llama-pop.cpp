// prefill-only pruning: which rows are full, and the C ABI, see llama-pop.h

#include "llama-pop.h"
#include "llama-pop-cells.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <exception>
#include <limits>
#include <string>

//
// rows
//

enum row_depth {
    ROW_CONTEXT = 0,
    ROW_MARKED  = 1, // full only because of llama_pop_set_deep_rows()
    ROW_FULL    = 2,
};

static row_depth get_depth(const llama_pop_cparams & pop, llama_pos pos, bool output, int32_t n_seq_id, const llama_seq_id * seq_ids) {
    if (output || pos < (int64_t) pop.sink_tokens) {
        return ROW_FULL;
    }

    row_depth depth = ROW_CONTEXT;
    for (int32_t s = 0; s < n_seq_id; ++s) {
        const size_t seq_id = seq_ids[s];
        if (seq_id < pop.full_from.size() && pos >= pop.full_from[seq_id]) {
            return ROW_FULL;
        }
        if (seq_id < pop.deep_rows.size() && std::binary_search(pop.deep_rows[seq_id].begin(), pop.deep_rows[seq_id].end(), pos)) {
            depth = ROW_MARKED;
        }
    }

    return depth;
}

static row_depth get_depth(const llama_pop_cparams & pop, const llama_ubatch & ubatch, uint32_t i) {
    return get_depth(pop, ubatch.pos[i], ubatch.output[i], ubatch.n_seq_id[i], ubatch.seq_id[i]);
}

bool llama_pop_needs_split(const llama_pop_cparams * pop, const llama_batch & batch, int32_t a, int32_t b) {
    return pop && pop->separate_rows &&
        (get_depth(*pop, batch.pos[a], batch.logits[a], batch.n_seq_id[a], batch.seq_id[a]) == ROW_CONTEXT) !=
        (get_depth(*pop, batch.pos[b], batch.logits[b], batch.n_seq_id[b], batch.seq_id[b]) == ROW_CONTEXT);
}

static llama_pop_plan plan_reserve(const llama_cparams & cparams, const llama_ubatch & ubatch) {
    const auto & pop = cparams.pop;

    // equally many of each sequence, since attention splits the rows evenly among KV streams, and fewer than all
    const uint32_t n_each = pop.separate_rows ? 0 : std::min(pop.n_reserve, ubatch.n_seq_tokens - 1);

    llama_pop_plan plan;
    plan.il = pop.boundary > 0 ? pop.boundary : pop.exact;
    for (uint32_t i = 0; i < n_each*ubatch.n_seqs; ++i) {
        plan.rows.push_back(i);
    }
    return plan;
}

// full rows are those with logits. attention splits rows evenly among KV streams, so streams with fewer of them are filled up
// with rows that are computed in vain
static llama_pop_plan plan_exact(const llama_cparams & cparams, const llama_ubatch & ubatch) {
    const uint32_t n_streams = cparams.kv_unified ? 1 : ubatch.n_seqs_unq;
    const uint32_t n_each    = ubatch.n_tokens/n_streams;

    std::vector<uint32_t> n_outputs(n_streams, 0);
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        n_outputs[i/n_each] += ubatch.output[i] != 0;
    }

    const uint32_t n_max = *std::max_element(n_outputs.begin(), n_outputs.end());

    llama_pop_plan plan;

    if (n_max == n_each) {
        return plan;
    }

    plan.il = cparams.pop.exact;

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        auto & n = n_outputs[i/n_each];
        if (ubatch.output[i] || n < n_max) {
            plan.rows.push_back(i);
            n += !ubatch.output[i];
        }
    }

    return plan;
}

bool llama_pop_reads_all(const llama_cparams & cparams) {
    const auto & layer_inp = cparams.embeddings_layer_inp;
    return cparams.embeddings || cparams.embeddings_nextn || cparams.training || cparams.ctx_type == LLAMA_CONTEXT_TYPE_MTP ||
        std::find(layer_inp.begin(), layer_inp.end(), true) != layer_inp.end();
}

llama_pop_plan llama_pop_make_plan(const llama_cparams & cparams, const llama_ubatch & ubatch) {
    const auto & pop = cparams.pop;

    // a reserve's ubatch uses the list of unique sequences as its rows' sequences, see ubatch_prepare_reserve()
    const bool is_reserve = ubatch.seq_id[0] == ubatch.seq_id_unq;
    if (is_reserve) {
        return pop.n_reserve > 0 ? plan_reserve(cparams, ubatch) : llama_pop_plan();
    }

    llama_pop_plan plan;

    if (pop.mode == LLAMA_POP_MODE_OFF || pop.is_deep_pass || llama_pop_reads_all(cparams)) {
        return plan;
    }

    if (pop.boundary == 0) {
        return pop.exact > 0 && !pop.separate_rows && !cparams.cb_eval && pop.taps.empty() ? plan_exact(cparams, ubatch) : plan;
    }

    // tokens without a causal mask belong to an encoder. image rows attend to each other, and can be context rows
    if (!cparams.causal_attn && !ubatch.embd) {
        return plan;
    }

    if (pop.mode == LLAMA_POP_MODE_CONTEXT) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            if (get_depth(pop, ubatch, i) != ROW_CONTEXT) {
                plan.rows.push_back(i);
            }
        }
    }

    // a recurrent layer needs its rows in order: such ubatches hold rows of one kind, or all are full
    const bool is_mixed = !plan.rows.empty() && plan.rows.size() < ubatch.n_tokens;
    if (plan.rows.size() < ubatch.n_tokens && !(pop.separate_rows && is_mixed)) {
        plan.il = pop.boundary;
    }

    return plan;
}

bool llama_pop_same_graph(const llm_graph_params & a, const llm_graph_params & b) {
    const auto plan_a = llama_pop_make_plan(a.cparams, a.ubatch);
    const auto plan_b = llama_pop_make_plan(b.cparams, b.ubatch);

    const auto & pop_a = a.cparams.pop;
    const auto & pop_b = b.cparams.pop;
    if (pop_a.is_deep_pass != pop_b.is_deep_pass || pop_a.snapshots != pop_b.snapshots || pop_a.taps != pop_b.taps ||
            pop_a.kernels != pop_b.kernels || pop_a.reading != pop_b.reading || pop_a.boundary != pop_b.boundary) {
        return false;
    }

    return plan_a.il == plan_b.il && (plan_a.il < 0 || plan_a.rows.size() == plan_b.rows.size());
}

void llama_pop_count(llama_pop_counters & counters, const llama_cparams & cparams, const llama_ubatch & ubatch) {
    if (cparams.pop.is_deep_pass) {
        counters.n_deep += ubatch.n_tokens;
        return;
    }

    const auto plan = llama_pop_make_plan(cparams, ubatch);

    const int64_t n_full = plan.il < 0 ? ubatch.n_tokens : plan.rows.size();

    counters.n_full += n_full;
    if (cparams.pop.mode == LLAMA_POP_MODE_CONTEXT && cparams.pop.boundary > 0) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            counters.n_marked += get_depth(cparams.pop, ubatch, i) == ROW_MARKED;
        }
    }

    (cparams.pop.boundary > 0 ? counters.n_context : counters.n_exact) += ubatch.n_tokens - n_full;
}

bool llama_pop_one_seq(const llama_cparams & cparams, uint32_t n_outputs, uint32_t n_tokens) {
    const auto & pop = cparams.pop;

    // upstream's recurrent snapshots need the last rows of a sequence in one ubatch: all rows are full then
    if (pop.separate_rows && cparams.n_rs_seq > 0) {
        return false;
    }

    return pop.boundary > 0 && (!cparams.kv_unified || pop.separate_rows) &&
        (pop.mode == LLAMA_POP_MODE_ALWAYS || (pop.mode == LLAMA_POP_MODE_CONTEXT && n_outputs < n_tokens));
}

bool llama_pop_reserve(llama_context & ctx, llama_pop_cparams & pop, uint32_t n_tokens, const llama_memory_context_i * mctx) {
    const auto & cparams = ctx.get_cparams();
    const auto & hparams = ctx.get_model().hparams;

    pop.memory = ctx.get_memory();
    pop.separate_rows  = pop.memory && !llama_pop_get_caches(pop.memory).base;

    // nothing is pruned if all states are read, and pooling expects all rows
    if (!pop.memory || (pop.boundary == 0 && pop.exact == 0) || hparams.no_alloc || llama_pop_reads_all(cparams)) {
        return true;
    }

    const uint32_t n_seqs = cparams.kv_unified ? 1 : cparams.n_seq_max;

    pop.n_reserve = pop.boundary > 0 ? std::max(1u, hparams.pop.sink_tokens + hparams.pop.tail_tokens) : 1;
    const bool ok = ctx.graph_reserve(n_tokens, n_seqs, n_seqs, mctx) != nullptr;
    pop.n_reserve = 0;

    return ok;
}

//
// C ABI
//

llama_pop_cparams llama_pop_init(const llama_model & model) {
    const auto & hparams = model.hparams.pop;

    llama_pop_cparams pop;

    pop.boundary    = hparams.boundary;
    pop.sink_tokens = hparams.sink_tokens;
    pop.exact       = std::max(1u, llama_pop_exact_layer(model.hparams)) - 1;
    pop.mode        = pop.boundary > 0 || pop.exact > 0 ? LLAMA_POP_MODE_CONTEXT : LLAMA_POP_MODE_OFF;

    return pop;
}

int32_t llama_pop_abi(void) {
    return 13;
}

void llama_pop_report_exceptions(void) {
    std::set_terminate([] {
        std::string reason = "std::terminate";
        if (const auto thrown = std::current_exception()) {
            try {
                std::rethrow_exception(thrown);
            } catch (const std::exception & error) {
                reason = error.what();
            } catch (...) {
                reason = "an unknown exception";
            }
        }
        GGML_ABORT("%s", reason.c_str());
    });
}

int32_t llama_pop_model_boundary(const llama_model * model) {
    return llama_pop_find_obstacle(*model, std::max(1u, model->hparams.n_deepstack_layers)).empty() ? (int32_t) model->hparams.pop.boundary : -1;
}

int32_t llama_pop_model_exact(const llama_model * model) {
    return llama_pop_exact_layer(model->hparams);
}

int32_t llama_pop_set_mode(llama_context * ctx, int32_t mode) {
    auto & pop = ctx->pop();

    if (mode < LLAMA_POP_MODE_OFF || mode > LLAMA_POP_MODE_ALWAYS) {
        LLAMA_LOG_ERROR("%s: unknown mode %d\n", __func__, mode);
        return -1;
    }
    if (pop.boundary == 0 && (mode == LLAMA_POP_MODE_ALWAYS || (mode == LLAMA_POP_MODE_CONTEXT && pop.exact == 0))) {
        LLAMA_LOG_ERROR("%s: the model has no boundary\n", __func__);
        return -1;
    }

    pop.mode = (llama_pop_mode) mode;
    return 0;
}

int32_t llama_pop_get_mode(const llama_context * ctx) {
    return ctx->get_cparams().pop.mode;
}

// return whether the architecture's graph reaches the boundary: build a pruned graph without computing it
static bool reaches_boundary(llama_context & ctx) {
    const auto & cparams = ctx.get_cparams();
    if (llama_pop_reads_all(cparams)) {
        return true;
    }

    ctx.synchronize();
    ctx.sched_reserve();

    const uint32_t n_seqs = cparams.kv_unified ? 1 : cparams.n_seq_max;
    const auto     mctx   = ctx.get_memory()->init_full();

    ctx.pop().n_reserve = 1;
    try {
        ctx.graph_reserve(2*n_seqs, n_seqs, n_seqs, mctx.get(), true);
        ctx.pop().n_reserve = 0;
        return true;
    } catch (const std::exception & error) {
        ctx.pop().n_reserve = 0;
        LLAMA_LOG_ERROR("%s: %s\n", __func__, error.what());
        return false;
    }
}

int32_t llama_pop_set_boundary(llama_context * ctx, int32_t layer) {
    const auto & model   = ctx->get_model();
    const auto & hparams = model.hparams;

    auto & pop = ctx->pop();

    if (layer == 0) {
        pop.boundary = hparams.pop.boundary;
        pop.mode     = pop.boundary > 0 || pop.exact > 0 ? pop.mode : LLAMA_POP_MODE_OFF;
        return 0;
    }
    const auto obstacle = llama_pop_find_obstacle(model, std::max(0, layer));
    if (!obstacle.empty() || !pop.memory) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, obstacle.empty() ? "the context has no memory" : obstacle.c_str());
        return -1;
    }
    if (hparams.pop.fitted && layer != (int32_t) hparams.pop.boundary) {
        LLAMA_LOG_ERROR("%s: the projections are fitted to boundary %u\n", __func__, hparams.pop.boundary);
        return -1;
    }

    const uint32_t before = pop.boundary;

    pop.boundary = layer;
    if (before != pop.boundary && !reaches_boundary(*ctx)) {
        pop.boundary = before;
        return -1;
    }
    return 0;
}

int32_t llama_pop_get_boundary(const llama_context * ctx) {
    return ctx->get_cparams().pop.boundary;
}

int32_t llama_pop_set_full_from(llama_context * ctx, llama_seq_id seq_id, llama_pos pos) {
    if (seq_id < 0 || seq_id >= LLAMA_MAX_SEQ) {
        LLAMA_LOG_ERROR("%s: sequence %d is not between 0 and %d\n", __func__, seq_id, LLAMA_MAX_SEQ - 1);
        return -1;
    }

    const llama_pos none = std::numeric_limits<llama_pos>::max();

    auto & full_from = ctx->pop().full_from;
    if (full_from.size() <= (size_t) seq_id) {
        full_from.resize(seq_id + 1, none);
    }
    full_from[seq_id] = pos < 0 ? none : pos;
    return 0;
}

int32_t llama_pop_set_deep_rows(llama_context * ctx, llama_seq_id seq_id, const llama_pos * pos, int32_t n) {
    if (seq_id < 0 || seq_id >= LLAMA_MAX_SEQ) {
        LLAMA_LOG_ERROR("%s: sequence %d is not between 0 and %d\n", __func__, seq_id, LLAMA_MAX_SEQ - 1);
        return -1;
    }
    if (n < 0 || !std::is_sorted(pos, pos + n)) {
        LLAMA_LOG_ERROR("%s: the positions are not ascending\n", __func__);
        return -1;
    }

    auto & deep_rows = ctx->pop().deep_rows;
    if (deep_rows.size() <= (size_t) seq_id) {
        deep_rows.resize(seq_id + 1);
    }
    deep_rows[seq_id].assign(pos, pos + n);
    return 0;
}

int32_t llama_pop_set_sink(llama_context * ctx, int32_t n_tokens) {
    ctx->pop().sink_tokens = n_tokens < 0 ? ctx->get_model().hparams.pop.sink_tokens : n_tokens;
    return 0;
}

int32_t llama_pop_set_reading(llama_context * ctx, int32_t reading) {
    if (reading < LLAMA_POP_READING_NONE || reading > LLAMA_POP_READING_CONTEXT) {
        LLAMA_LOG_ERROR("%s: unknown value %d\n", __func__, reading);
        return -1;
    }
    ctx->pop().reading = (llama_pop_reading) reading;
    return 0;
}

void llama_pop_get_counters(const llama_context * ctx, llama_pop_counters * counters) {
    *counters = ctx->pop_counters;
}

void llama_pop_reset_counters(llama_context * ctx) {
    ctx->pop_counters = {};
}
