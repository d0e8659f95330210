// prefill-only pruning: multiply-accumulates, counted on the graph, see llama-pop.h

#include "llama-pop.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>

// return the sum of cells that the last n_rows of a prompt attend to. n_swa: the sliding window, 0: none
static int64_t count_visible(int64_t n_prompt, int64_t n_rows, int64_t n_swa) {
    const auto count = [&](int64_t n) {
        const int64_t n_inside = n_swa > 0 ? std::min(n, n_swa) : n;
        return n_inside*(n_inside + 1)/2 + (n - n_inside)*n_swa;
    };
    return count(n_prompt) - count(n_prompt - n_rows);
}

static bool is_named(const ggml_tensor * node, const char * prefix) {
    return strncmp(node->name, prefix, strlen(prefix)) == 0;
}

// return the layer, which is part of the names of scores, of sums and of the view of K in the cache
static int32_t find_layer(const ggml_tensor * node) {
    const char * number = node->op == GGML_OP_FLASH_ATTN_EXT ? strstr(node->src[1]->name, "_l") : strrchr(node->name, '-');
    return number ? atoi(number + (*number == '_' ? 2 : 1)) : 0;
}

static int64_t count_node(const ggml_tensor * node, const llama_hparams & hparams, int64_t n_prompt) {
    const auto visible = [&](int64_t n_rows) {
        return count_visible(n_prompt, n_rows, hparams.is_swa(find_layer(node)) ? hparams.n_swa : 0);
    };

    switch (node->op) {
        case GGML_OP_FLASH_ATTN_EXT: // q [n, n_rows, n_head]
            return (node->src[0]->ne[0] + node->src[2]->ne[0])*node->src[0]->ne[2]*visible(node->src[0]->ne[1]);
        case GGML_OP_MUL_MAT:
            if (is_named(node, "kq-")) { // [n_kv, n_rows, n_head]
                return node->src[0]->ne[0]*node->ne[2]*visible(node->ne[1]);
            }
            if (is_named(node, "kqv-")) { // [n, n_rows, n_head]
                return node->ne[0]*node->ne[2]*visible(node->ne[1]);
            }
            return ggml_nelements(node)*node->src[0]->ne[0];
        case GGML_OP_MUL_MAT_ID:
            return ggml_nelements(node)*node->src[0]->ne[0];
        default:
            return 0;
    }
}

static int64_t count_graph(llama_context & ctx, const llama_memory_context_i * mctx, int32_t n_rows, int32_t n_prompt) {
    ggml_cgraph * gf = ctx.graph_reserve(n_rows, 1, 1, mctx, true);

    int64_t res = 0;
    for (int i = 0; gf && i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        if (node->flags & GGML_TENSOR_FLAG_COMPUTE) {
            res += count_node(node, ctx.get_model().hparams, n_prompt);
        }
    }
    return res;
}

int64_t llama_pop_count_macs(llama_context * ctx, int32_t n_tokens, int32_t n_full) {
    const auto & cparams = ctx->get_cparams();

    if (ctx->pop().mode == LLAMA_POP_MODE_ALWAYS || llama_pop_reads_all(cparams) || (!cparams.kv_unified && cparams.n_seq_max > 1)) {
        LLAMA_LOG_ERROR("%s: only contexts with logits and a single sequence can be counted, with mode OFF or CONTEXT\n", __func__);
        return -1;
    }
    if (n_tokens < 1 || n_tokens > (int32_t) std::min(cparams.n_ubatch, cparams.n_ctx) || n_full < 1 || !ctx->get_memory()) {
        LLAMA_LOG_ERROR("%s: %d tokens with %d full rows, expected up to %u tokens\n", __func__, n_tokens, n_full, cparams.n_ubatch);
        return -1;
    }

    ctx->synchronize();
    ctx->sched_reserve();

    auto & pop = ctx->pop();

    const auto mctx   = ctx->get_memory()->init_full();
    const bool prunes = pop.mode != LLAMA_POP_MODE_OFF && (pop.boundary > 0 || pop.exact > 0) && n_full < n_tokens;
    const bool split  = prunes && pop.separate_rows;

    pop.n_reserve = prunes ? n_full : 0;
    int64_t res   = count_graph(*ctx, mctx.get(), split ? n_tokens - n_full : n_tokens, split ? n_tokens - n_full : n_tokens);
    pop.n_reserve = 0;

    return split ? res + count_graph(*ctx, mctx.get(), n_full, n_tokens) : res;
}
