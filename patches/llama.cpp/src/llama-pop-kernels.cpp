// which operations of a graph our CPU kernels (ggml-cpu/fast) compute, see llama_pop_set_kernels() and llama_pop_choose_kernels()

#include "llama-pop.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <cctype>
#include <cstring>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

// enum ggml_pop_rows and GGML_POP_OP_PARAM of ggml-cpu/fast/fast.h. other backends ignore the parameter
enum kernel_rows {
    KERNEL_ROWS_FAST = 0,
    KERNEL_ROWS_NONE = 1,
    KERNEL_ROWS_ALL  = 2,

    KERNEL_ROWS_CHOSEN = 4, // added to FAST or ALL
};

static const int KERNEL_OP_PARAM = 15;

//
// choice
//

// the operations that llama.cpp's kernels compute, or, if is_only is set, the operations that our kernels compute
struct kernel_choice {
    bool is_only = false;

    std::bitset<GGML_TYPE_COUNT> many, few; // by weight type

    bool attention_many = false;
    bool attention_few  = false;
};

static const int32_t KERNELS_OURS = 1;

// registered choices never change, so graphs of other threads can read them. 0 is unused, see llama_pop_set_kernels()
static std::array<kernel_choice, 256> kernel_choices;
static std::vector<std::string>       kernel_choice_texts = { "-", "" };
static std::mutex                     kernel_choices_mutex;

static bool is_type_named(const std::string & name, ggml_type type) {
    const char * lower = ggml_type_name(type);
    return lower && std::equal(name.begin(), name.end(), lower, lower + strlen(lower), [](unsigned char a, unsigned char b) {
        return a == std::toupper(b);
    });
}

static void add_kernel_choice(kernel_choice & choice, const std::string & kind, const std::string & form) {
    if (kind == "attention") {
        choice.attention_many |= form == "many";
        choice.attention_few  |= form == "few";
    }
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        if (is_type_named(kind, (ggml_type) i)) {
            choice.many[i] = choice.many[i] || form == "many";
            choice.few[i]  = choice.few[i]  || form == "few";
        }
    }
}

int32_t llama_pop_choose_kernels(const char * choice) {
    const std::lock_guard<std::mutex> lock(kernel_choices_mutex);
    const auto   found = std::find(kernel_choice_texts.begin() + KERNELS_OURS, kernel_choice_texts.end(), choice);
    const size_t i     = found - kernel_choice_texts.begin();
    if (i == kernel_choices.size()) {
        LLAMA_LOG_ERROR("%s: more than %zu different choices\n", __func__, kernel_choices.size() - KERNELS_OURS);
        return -1;
    }
    if (found == kernel_choice_texts.end()) {
        std::istringstream words(choice);
        for (std::string word; words >> word;) {
            kernel_choices[i].is_only |= word == "only";
            const size_t end = std::min(word.find('/'), word.size() - 1);
            add_kernel_choice(kernel_choices[i], word.substr(0, end), word.substr(end + 1));
        }
        kernel_choice_texts.push_back(choice);
    }
    return (int32_t) i;
}

//
// marks
//

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

static bool is_named(const kernel_choice & choice, const ggml_tensor * node, bool is_many) {
    switch (node->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:     return (is_many ? choice.many : choice.few)[node->src[0]->type];
        case GGML_OP_FLASH_ATTN_EXT: return is_many ? choice.attention_many : choice.attention_few;
        default:                     return false;
    }
}

static int32_t get_kernel_rows(const llama_pop_cparams & pop, const ggml_tensor * node, bool is_deep) {
    // with READING_CONTEXT, the deep pass of a graph has only rows of answers
    const bool reads = pop.reading == LLAMA_POP_READING_SOME || (pop.reading == LLAMA_POP_READING_CONTEXT && !is_deep);
    const bool is_many = reads || pop.is_deep_pass;
    const kernel_choice & choice = kernel_choices[pop.kernels];
    if (!pop.kernels || is_named(choice, node, is_many) != choice.is_only) {
        return KERNEL_ROWS_NONE;
    }
    return (is_many ? KERNEL_ROWS_ALL : KERNEL_ROWS_FAST) + (choice.is_only ? KERNEL_ROWS_CHOSEN : 0);
}

void llama_pop_mark_graph(llm_graph_result & res, const llama_pop_cparams & pop) {
    ggml_cgraph * gf = res.get_gf();

    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        if (has_kernels(node->op)) {
            node->op_params[KERNEL_OP_PARAM] = get_kernel_rows(pop, node, res.pop.n_context >= 0 && i >= res.pop.n_context);
        }
    }
}

int32_t llama_pop_set_kernels(llama_context * ctx, int32_t kernels) {
    const std::lock_guard<std::mutex> lock(kernel_choices_mutex);
    if (kernels < 0 || (size_t) kernels >= kernel_choice_texts.size()) {
        LLAMA_LOG_ERROR("%s: unknown value %d\n", __func__, kernels);
        return -1;
    }
    ctx->pop().kernels = (uint8_t) kernels;
    return 0;
}
