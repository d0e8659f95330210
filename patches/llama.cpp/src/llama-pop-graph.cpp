// prefill-only pruning: building the graph, see llama-pop.h and patches/README.md

#include "llama-pop-build.h"
#include "llama-pop-cells.h"
#include "llama-pop-inputs.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <stdexcept>
#include <unordered_set>

//
// nodes
//

// return whether the node writes to memory outside the graph: K and V, recurrent states
static bool writes(const ggml_tensor * node) {
    switch (node->op) {
        case GGML_OP_NONE:
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return false;
        default:
            return node->view_src && node->view_src->buffer;
    }
}

// drop the nodes in [first, end), except roots and the inputs of remaining nodes
template <typename F>
static void drop_nodes(llm_graph_result & res, int first, int end, F is_root) {
    ggml_cgraph  * gf  = res.get_gf();
    ggml_context * ctx = res.get_ctx();

    std::vector<ggml_tensor *> nodes(ggml_graph_nodes(gf), ggml_graph_nodes(gf) + ggml_graph_n_nodes(gf));

    std::unordered_set<const ggml_tensor *> needed;
    std::vector<ggml_tensor *> remaining;

    for (int i = (int) nodes.size() - 1; i >= 0; --i) {
        ggml_tensor * node = nodes[i];

        if (i >= first && i < end && !is_root(node) && needed.count(node) == 0) {
            continue;
        }
        remaining.push_back(node);
        needed.insert(std::begin(node->src), std::end(node->src));
        needed.insert(node->view_src);
    }

    ggml_graph_clear(gf);

    for (auto it = remaining.rbegin(); it != remaining.rend(); ++it) {
        if ((*it)->flags & GGML_TENSOR_FLAG_COMPUTE) {
            ggml_build_forward_expand(gf, *it);
        } else {
            ggml_build_forward_order(gf, *it);
        }
    }
    // inputs are set even if no node reads them, so they must be allocated. a view keeps each one in the graph. unread leafs would
    // not work: ggml_gallocr reuses an allocation if graphs differ only in these
    for (ggml_tensor * cur = ggml_get_first_tensor(ctx); cur; cur = ggml_get_next_tensor(ctx, cur)) {
        if (cur->flags & GGML_TENSOR_FLAG_INPUT && needed.count(cur) == 0) {
            ggml_build_forward_expand(gf, ggml_view_1d(ctx, cur, cur->ne[0], 0));
        }
    }
}

static void drop_results(llm_graph_result & res) {
    res.t_logits = res.t_embd = res.t_embd_pooled = res.t_h_nextn = nullptr;
}

//
// layers
//

// select the states of some rows, in cur's shape: rows are the last dimension in which the shapes differ
static ggml_tensor * pick_states(const llm_graph_context & g, ggml_tensor * states, const ggml_tensor * cur, ggml_tensor * ids) {
    if (!ggml_is_contiguous(states)) {
        states = ggml_cont(g.ctx0, states);
    }
    // [n, n_tokens] or [n, n_tokens, n_slices]
    if (states->ne[2] == cur->ne[2]) {
        return llama_pop_get_rows(g, states, ids);
    }
    // [n, n_slices, n_tokens]
    states = ggml_reshape_2d(g.ctx0, states, states->ne[0]*states->ne[1], states->ne[2]);
    return ggml_reshape_3d(g.ctx0, llama_pop_get_rows(g, states, ids), cur->ne[0], cur->ne[1], cur->ne[2]);
}

// build the states that the deep pass starts from. cur: its state at the boundary, only for the shape
static ggml_tensor * build_states(const llm_graph_context & g, llama_pop_build & build, const ggml_tensor * cur) {
    auto & deep = *build.deep;

    if (!build.state) {
        return deep.states = llama_pop_new_input(g, GGML_TYPE_F32, g.n_embd, g.n_tokens);
    }
    deep.ids = llama_pop_new_input(g, GGML_TYPE_I32, g.n_tokens, build.state->ne[2] == cur->ne[2] ? cur->ne[2] : 1);
    return pick_states(g, build.state, cur, deep.ids);
}

// build the output of a skipped layer: its input. cur has fewer rows if the architecture selected those with logits
static ggml_tensor * skip_layer(const llm_graph_context & g, ggml_tensor * states, const ggml_tensor * cur) {
    if (ggml_nelements(cur) == ggml_nelements(states)) {
        // a separate node, since the architecture names it
        return ggml_view_3d(g.ctx0, states, states->ne[0], states->ne[1], states->ne[2], states->nb[1], states->nb[2], 0);
    }
    for (const auto & input : g.res->inputs) {
        if (const auto * outputs = dynamic_cast<const llm_graph_input_out_ids *>(input.get())) {
            return pick_states(g, states, cur, outputs->out_ids);
        }
    }
    GGML_ABORT("the architecture selected rows without llm_graph_input_out_ids");
}

ggml_tensor * llama_pop_end_layer(const llm_graph_context & g, ggml_tensor * cur, int il) {
    auto & build = g.res->pop;

    if (build.pass == LLAMA_POP_PASS_WHOLE) {
        llama_pop_tap_state(g, cur, il);
    }
    if (build.boundary == 0 || il < build.boundary - 1) {
        return cur;
    }
    if (il >= build.boundary) {
        if (build.pass == LLAMA_POP_PASS_DEEP) {
            llama_pop_tap_state(g, cur, il);
        }
        if (build.pass != LLAMA_POP_PASS_CONTEXT) {
            return cur;
        }
        if (il == build.boundary) {
            ggml_build_forward_expand(g.gf, cur); // has_gelu() searches these nodes
        }
        return skip_layer(g, build.state, cur);
    }

    const bool is_deep = build.pass == LLAMA_POP_PASS_DEEP;
    if (is_deep) {
        cur = build_states(g, build, cur);
    } else {
        build.state = cur;
    }
    ggml_build_forward_expand(g.gf, cur);

    if (!is_deep && g.cparams.pop.snapshots && build.boundary == (int32_t) g.cparams.pop.boundary && cur->ne[0] == g.n_embd && cur->ne[1] == g.n_tokens && cur->ne[2] == 1) {
        llama_pop_add_output(g, ggml_cont(g.ctx0, cur), LLAMA_POP_STATES);
    }

    build.n_nodes = ggml_graph_n_nodes(g.gf);

    if (is_deep) {
        llama_pop_tap_state(g, cur, il); // after n_nodes is set, so the tap is not dropped
    }
    return cur;
}

//
// graph
//

uint32_t llama_pop_max_nodes(llama_memory_i * memory, uint32_t n_nodes) {
    return llama_pop_get_caches(memory).base ? 3*n_nodes : 2*n_nodes; // with a KV cache two builds; fitted projections, taps, views
}

static void check_boundary_reached(const llm_graph_params & params) {
    if (params.res->pop.n_nodes < 0) {
        throw std::runtime_error(format("prefill-only pruning: the graph of architecture '%s' has no boundary at layer %d",
                llm_arch_name(params.arch), params.res->pop.boundary));
    }
}

// build the layers from the boundary on for the full rows
static std::unique_ptr<llm_graph_context> build_deep(const llama_model & model, const llm_graph_params & params) {
    auto & res   = *params.res;
    auto & build = res.pop;

    auto deep = std::make_unique<llm_graph_input_pop>(params);

    build.pass    = LLAMA_POP_PASS_DEEP;
    build.deep    = deep.get();
    build.n_nodes = -1;

    const size_t n_inputs = res.inputs.size();
    const int    n_nodes  = ggml_graph_n_nodes(res.get_gf());

    auto llm = model.build_arch_graph(deep->params);
    check_boundary_reached(params);

    drop_nodes(res, n_nodes, build.n_nodes, [](const ggml_tensor *) { return false; });

    deep->inputs.assign(std::make_move_iterator(res.inputs.begin() + n_inputs), std::make_move_iterator(res.inputs.end()));
    res.inputs.resize(n_inputs);
    res.add_input(std::move(deep));
    res.set_params(params);

    return llm;
}

std::unique_ptr<llm_graph_context> llama_pop_build_graph(const llama_model & model, const llm_graph_params & params) {
    auto & res   = *params.res;
    auto & build = res.pop;

    const auto & pop  = params.cparams.pop;
    const auto   plan = llama_pop_make_plan(params.cparams, params.ubatch);

    build       = {};
    build.model = &model;

    if (pop.is_deep_pass) {
        build.boundary = pop.boundary;
        return build_deep(model, params);
    }
    if (plan.il < 0) {
        build.boundary = pop.snapshots ? pop.boundary : 0;
        return model.build_arch_graph(params);
    }

    build.pass     = LLAMA_POP_PASS_CONTEXT;
    build.boundary = plan.il;

    auto llm = model.build_arch_graph(params);
    check_boundary_reached(params);
    llama_pop_check_projected(params);

    const bool has_logits = pop.mode == LLAMA_POP_MODE_ALWAYS && params.n_outputs > 0;
    if (!has_logits) {
        drop_results(res);
    }
    drop_nodes(res, build.n_nodes, ggml_graph_n_nodes(res.get_gf()), [&](const ggml_tensor * node) { return writes(node) || node == res.t_logits; });

    if (plan.rows.empty()) {
        return llm;
    }
    build.n_context = ggml_graph_n_nodes(res.get_gf());
    return build_deep(model, params);
}
