// prefill-only pruning: states and scores, kept after each ubatch, see llama-pop.h

#include "llama-pop.h"

#include "llama-pop-cells.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <functional>
#include <new>

//
// after each ubatch
//

static void get_output(ggml_backend_sched_t sched, ggml_tensor * cur, std::vector<float> & dst) {
    dst.resize(ggml_nelements(cur));
    ggml_backend_tensor_get_async(ggml_backend_sched_get_tensor_backend(sched, cur), cur, dst.data(), 0, ggml_nbytes(cur));
}

// the cells of the rows, by stream
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

static size_t n_scores(const llama_hparams & hparams, const llama_kv_cache & kv) {
    return (size_t) hparams.n_head()*kv.get_size()*LLAMA_POP_SCORE_LAYERS;
}

static void reserve(llama_pop_kept & kept, const llama_hparams & hparams, const llama_kv_cache & kv) {
    kept.states.reserve(n_states(hparams, kv));
    kept.asked .reserve(n_scores(hparams, kv));
    kept.paid  .reserve(n_scores(hparams, kv));
}

void llama_context::pop_finish(const llama_ubatch & ubatch, const llama_memory_context_i * mctx, const llm_graph_result & res) {
    llama_pop_count(pop_counters, cparams, ubatch);
    llama_pop_take_taps(*this, ubatch, mctx, res);

    ggml_tensor * t_states = ggml_graph_get_tensor(res.get_gf(), LLAMA_POP_STATES);
    if (!t_states) {
        return;
    }

    const auto & kv = *llama_pop_get_caches(memory.get()).base;

    const int64_t n_embd   = model.hparams.n_embd;
    const int64_t n_head   = model.hparams.n_head();
    const int64_t n_cells  = kv.get_size();
    const int64_t boundary = cparams.pop.boundary;
    const auto    cells    = find_rows(kv, ubatch);

    auto & kept = pop_kept;

    if (kept.states.empty() || kept.boundary != boundary) {
        kept.boundary = boundary;
        kept.states.assign(n_states(model.hparams, kv), 0.0f);
        kept.asked .assign(n_scores(model.hparams, kv), 0.0f);
        kept.paid  .assign(n_scores(model.hparams, kv), 0.0f);
        for (uint32_t s = 0; s < kv.get_n_seq_max(); ++s) {
            auto & flags = kv.get_cells(s).pop_kept;
            flags.assign(flags.size(), false);
        }
    }

    ggml_backend_t backend = ggml_backend_sched_get_tensor_backend(sched.get(), t_states);

    // rows of consecutive cells at once
    for (uint32_t i = 0, n = 0; i < ubatch.n_tokens; i += n) {
        for (n = 1; i + n < ubatch.n_tokens && cells[i + n] == cells[i] + n; ++n) {}
        ggml_backend_tensor_get_async(backend, t_states, kept.states.data() + cells[i]*n_embd, i*t_states->nb[1], n*t_states->nb[1]);
    }
    synchronize();

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        kv.get_cells(ubatch.seq_id[i][0]).pop_kept[cells[i] % n_cells] = true;
    }

    // who had these cells before is forgotten
    for (int64_t i = 0; i < n_head*LLAMA_POP_SCORE_LAYERS; ++i) {
        for (const auto cell : cells) {
            kept.asked[i*n_cells + cell % n_cells] = kept.paid[i*n_cells + cell % n_cells] = 0.0f;
        }
    }

    std::vector<float> buf;
    for (int64_t layer = 0; layer < LLAMA_POP_SCORE_LAYERS; ++layer) {
        char name[GGML_MAX_NAME];
        snprintf(name, sizeof(name), LLAMA_POP_SCORES, (int) (boundary - LLAMA_POP_SCORE_LAYERS + layer));

        ggml_tensor * t_scores = ggml_graph_get_tensor(res.get_gf(), name);
        if (!t_scores) {
            continue;
        }

        get_output(sched.get(), t_scores, buf);
        synchronize();

        const int64_t n_kv = t_scores->ne[1];
        for (int64_t head = 0; head < n_head; ++head) {
            float * asked = kept.asked.data() + (layer*n_head + head)*n_cells;
            float * paid  = kept.paid .data() + (layer*n_head + head)*n_cells;
            for (int64_t cell = 0; cell < n_kv; ++cell) {
                asked[cell] += buf[(head*n_kv + cell)*2];
                paid [cell] += buf[(head*n_kv + cell)*2 + 1];
            }
        }
    }
}

//
// C ABI
//

int32_t llama_pop_set_keep(llama_context * ctx, bool keep) {
    const auto & model = ctx->get_model();
    const auto * kv    = llama_pop_get_caches(ctx->get_memory()).base;

    if (keep && (ctx->pop().boundary == 0 || !kv)) {
        LLAMA_LOG_ERROR("%s: the model has no boundary, or the context no KV cache\n", __func__);
        return -1;
    }
    if (keep && model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        LLAMA_LOG_ERROR("%s: the tensors are split among devices\n", __func__);
        return -1;
    }

    ctx->pop().keep = keep;
    if (!keep) {
        ctx->pop_kept = {};
        return 0;
    }

    // here, where it can be said, and not in the middle of a prompt
    try {
        reserve(ctx->pop_kept, model.hparams, *kv);
    } catch (const std::bad_alloc &) {
        LLAMA_LOG_ERROR("%s: no memory for the states of %u rows\n", __func__, kv->get_size()*kv->get_n_stream());
        ctx->pop().keep = false;
        ctx->pop_kept   = {};
        return -1;
    }
    return 0;
}

size_t llama_pop_keep_size(const llama_context * ctx) {
    const auto & kept = ctx->pop_kept;
    return (kept.states.capacity() + kept.asked.capacity() + kept.paid.capacity())*sizeof(float);
}

int32_t llama_pop_set_question(llama_context * ctx, llama_seq_id seq_id, llama_pos pos) {
    auto & pop = ctx->pop();

    if (pos >= 0 && !pop.keep) {
        LLAMA_LOG_ERROR("%s: states are not kept, see llama_pop_set_keep()\n", __func__);
        return -1;
    }
    const auto kv = llama_pop_get_caches(ctx->get_memory());
    if (pos >= 0 && kv.swa && kv.swa->get_size() != kv.base->get_size()) {
        LLAMA_LOG_ERROR("%s: layers with a sliding window have other cells, open the context with swa_full\n", __func__);
        return -1;
    }
    if (pos >= 0 && !ctx->get_cparams().kv_unified && ctx->n_seq_max() > 1) {
        LLAMA_LOG_ERROR("%s: attention is not counted with a KV stream for each sequence\n", __func__);
        return -1;
    }

    pop.question_seq = pos < 0 ? -1 : seq_id;
    pop.question_pos = pos;

    std::fill(ctx->pop_kept.asked.begin(), ctx->pop_kept.asked.end(), 0.0f);
    return 0;
}

int32_t llama_pop_get_scores(llama_context * ctx, llama_seq_id seq_id, float * scores, int32_t n) {
    const auto * kv = llama_pop_get_caches(ctx->get_memory()).base;

    const auto & kept = ctx->pop_kept;
    if (!kv || kept.asked.empty() || seq_id < 0 || seq_id >= (llama_seq_id) kv->get_n_seq_max() || kv->get_n_stream() > 1) {
        LLAMA_LOG_ERROR("%s: no attention was counted\n", __func__);
        return -1;
    }

    const int64_t n_cells = kv->get_size();
    const int64_t n_head  = ctx->get_model().hparams.n_head();

    std::vector<int64_t> cells;
    for (llama_pos pos = 0; pos < n; ++pos) {
        cells.push_back(llama_pop_find_cell(kv->get_cells(seq_id), seq_id, pos));
        if (cells.back() < 0) {
            LLAMA_LOG_ERROR("%s: the sequence has no position %d\n", __func__, pos);
            return -1;
        }
    }

    std::fill(scores, scores + n, 0.0f);

    for (int64_t layer = 0; layer < LLAMA_POP_SCORE_LAYERS; ++layer) {
        std::vector<float> best(n, 0.0f);

        for (int64_t head = 0; head < n_head; ++head) {
            const float * asked = kept.asked.data() + (layer*n_head + head)*n_cells;
            const float * paid  = kept.paid .data() + (layer*n_head + head)*n_cells;

            float sum = 0.0f;
            for (const auto cell : cells) {
                sum += paid[cell];
            }
            // of a prompt that was read before states were kept, nobody paid anything
            const float mean = sum > 0.0f ? sum/n : 1.0f;
            for (int32_t i = 0; i < n; ++i) {
                best[i] = std::max(best[i], asked[cells[i]]/(paid[cells[i]] + mean));
            }
        }

        std::transform(best.begin(), best.end(), scores, scores, std::plus<>());
    }
    return 0;
}
