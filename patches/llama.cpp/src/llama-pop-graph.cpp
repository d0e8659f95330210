// prefill-only pruning: the graph, see llama-pop.h and patches/README.md

#include "llama-pop-graph.h"
#include "llama-pop-cells.h"
#include "llama-pop-inputs.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <stdexcept>
#include <unordered_set>

//
// nodes
//

// whether it writes into memory that was there before the graph: K and V, recurrent states
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

// drops the nodes from first to end, but those for which is_root() holds, those from end on, and what any of them needs
template <typename F>
static void drop_nodes(llm_graph_result & res, int first, int end, F is_root) {
    ggml_cgraph  * gf  = res.get_gf();
    ggml_context * ctx = res.get_ctx();

    std::vector<ggml_tensor *> nodes(ggml_graph_nodes(gf), ggml_graph_nodes(gf) + ggml_graph_n_nodes(gf));

    std::unordered_set<const ggml_tensor *> needed;
    std::vector<ggml_tensor *> kept;

    for (int i = (int) nodes.size() - 1; i >= 0; --i) {
        ggml_tensor * node = nodes[i];

        if (i >= first && i < end && !is_root(node) && needed.count(node) == 0) {
            continue;
        }
        kept.push_back(node);
        needed.insert(std::begin(node->src), std::end(node->src));
        needed.insert(node->view_src);
    }

    ggml_graph_clear(gf);

    for (auto it = kept.rbegin(); it != kept.rend(); ++it) {
        if ((*it)->flags & GGML_TENSOR_FLAG_COMPUTE) {
            ggml_build_forward_expand(gf, *it);
        } else {
            ggml_build_forward_order(gf, *it);
        }
    }
    // who sets an input expects it to be allocated. ggml_gallocr compares what nodes read: of two graphs it takes one for the
    // other if only unread leafs differ
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

// the states of some rows, of the shape that cur has: the last dimension in which the two differ is that of the rows
static ggml_tensor * pick_states(const llm_graph_context & g, ggml_tensor * states, const ggml_tensor * cur, ggml_tensor * ids) {
    if (!ggml_is_contiguous(states)) {
        states = ggml_cont(g.ctx0, states);
    }
    // [n, n_tokens] or [n, n_tokens, n_slices]
    if (states->ne[2] == cur->ne[2]) {
        return pick_rows(g, states, ids);
    }
    // [n, n_slices, n_tokens]
    states = ggml_reshape_2d(g.ctx0, states, states->ne[0]*states->ne[1], states->ne[2]);
    return ggml_reshape_3d(g.ctx0, pick_rows(g, states, ids), cur->ne[0], cur->ne[1], cur->ne[2]);
}

// the states that the second build begins with. cur is what it has at the boundary
static ggml_tensor * build_states(const llm_graph_context & g, llama_pop_build & build, const ggml_tensor * cur) {
    auto & deep = *build.deep;

    if (!build.state) {
        return deep.states = new_input(g, GGML_TYPE_F32, g.n_embd, g.n_tokens);
    }
    deep.ids = new_input(g, GGML_TYPE_I32, g.n_tokens, build.state->ne[2] == cur->ne[2] ? cur->ne[2] : 1);
    return pick_states(g, build.state, cur, deep.ids);
}

// what a skipped layer gives: the states that it was given. cur has fewer rows where only those with logits are left
static ggml_tensor * skip_layer(const llm_graph_context & g, ggml_tensor * states, const ggml_tensor * cur) {
    if (ggml_nelements(cur) == ggml_nelements(states)) {
        // a node of its own: the architecture gives it the layer's name
        return ggml_view_3d(g.ctx0, states, states->ne[0], states->ne[1], states->ne[2], states->nb[1], states->nb[2], 0);
    }
    for (const auto & input : g.res->inputs) {
        if (const auto * outputs = dynamic_cast<const llm_graph_input_out_ids *>(input.get())) {
            return pick_states(g, states, cur, outputs->out_ids);
        }
    }
    GGML_ABORT("rows were dropped without a list of them");
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
            ggml_build_forward_expand(g.gf, cur); // llama_pop_project() looks at it
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

    if (!is_deep && g.cparams.pop.keep && build.boundary == (int32_t) g.cparams.pop.boundary && cur->ne[0] == g.n_embd && cur->ne[1] == g.n_tokens && cur->ne[2] == 1) {
        build_output(g, ggml_cont(g.ctx0, cur), LLAMA_POP_STATES);
    }

    build.n_nodes = ggml_graph_n_nodes(g.gf);

    if (is_deep) {
        llama_pop_tap_state(g, cur, il); // behind the nodes that go
    }
    return cur;
}

//
// graph
//

uint32_t llama_pop_max_nodes(llama_memory_i * memory, uint32_t n_nodes) {
    return llama_pop_get_caches(memory).base ? 3*n_nodes : 2*n_nodes; // two builds and fitted projections; taps, views of inputs
}

static void check_met(const llm_graph_params & params) {
    if (params.res->pop.n_nodes < 0) {
        throw std::runtime_error(format("prefill-only pruning: the graph of architecture '%s' has no boundary at layer %d",
                llm_arch_name(params.arch), params.res->pop.boundary));
    }
}

// the layers from the boundary on for the rows that run all layers
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
    check_met(params);
    llama_pop_tap_heads(*llm);

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

    if (pop.deepening) {
        build.boundary = pop.boundary;
        return build_deep(model, params);
    }
    if (plan.il < 0) {
        build.boundary = pop.keep ? pop.boundary : 0;
        auto llm = model.build_arch_graph(params);
        llama_pop_tap_heads(*llm);
        return llm;
    }

    build.pass     = LLAMA_POP_PASS_CONTEXT;
    build.boundary = plan.il;

    auto llm = model.build_arch_graph(params);
    check_met(params);
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
