// which operations of a graph our CPU kernels (ggml-cpu/fast) compute, see llama_pop_set_kernels()

#include "llama-pop.h"

#include "llama-context.h"
#include "llama-graph.h"

// enum ggml_pop_rows and GGML_POP_OP_PARAM of ggml-cpu/fast/fast.h. other backends ignore the parameter
enum kernel_rows {
    KERNEL_ROWS_FAST = 0,
    KERNEL_ROWS_NONE = 1,
    KERNEL_ROWS_ALL  = 2,
};

static const int KERNEL_OP_PARAM = 15;

static bool has_kernels(ggml_op op) {
    switch (op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_FLASH_ATTN_EXT:
        case GGML_OP_GLU:
        case GGML_OP_RMS_NORM:
        case GGML_OP_MUL:
            return true;
        default:
            return false;
    }
}

static int32_t get_kernel_rows(const llama_pop_cparams & pop, bool is_deep) {
    if (!pop.kernels) {
        return KERNEL_ROWS_NONE;
    }
    // with READING_CONTEXT, the deep pass of a graph has only rows of answers
    const bool reads = pop.reading == LLAMA_POP_READING_SOME || (pop.reading == LLAMA_POP_READING_CONTEXT && !is_deep);
    return reads || pop.is_deep_pass ? KERNEL_ROWS_ALL : KERNEL_ROWS_FAST;
}

void llama_pop_mark_graph(llm_graph_result & res, const llama_pop_cparams & pop) {
    ggml_cgraph * gf = res.get_gf();

    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        if (has_kernels(node->op)) {
            node->op_params[KERNEL_OP_PARAM] = get_kernel_rows(pop, res.pop.n_context >= 0 && i >= res.pop.n_context);
        }
    }
}

int32_t llama_pop_set_kernels(llama_context * ctx, bool kernels) {
    ctx->pop().kernels = kernels;
    return 0;
}
