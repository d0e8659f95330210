// Asks upstream's tables of CUDA and Metal, compiled without their toolkits, about the nodes that
// our hooks add to a graph. gpu_tables.py inserts the functions from the backends' sources.
// Each line of the output is: NODE OPERATION CUDA METAL METAL-WITHOUT-BF16, with 1 if supported.
#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml.h"

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

// Stand-ins for the names in CUDA's function. No node of ours is a Hadamard product, attention, or an indexer.
struct ggml_backend_cuda_device_context {
    int device;
};
struct ggml_backend_cuda_buffer_type_context {
    int device;
};
struct cuda_devices {
    struct {
        int cc;
        size_t smpb;
    } devices[1];
};
static cuda_devices ggml_cuda_info() {
    return {};
}
static bool ggml_backend_buft_is_cuda(ggml_backend_buffer_type_t) {
    return false;
}
static bool ggml_cuda_op_mul_mat_use_fwht(const ggml_tensor *) {
    return false;
}
static bool ggml_cuda_flash_attn_ext_supported(int, const ggml_tensor *) {
    return false;
}
static bool ggml_cuda_lightning_indexer_supported(int, const ggml_tensor *) {
    return false;
}

// Stand-ins for the names in Metal's function.
#define OP_LIGHTNING_INDEXER_DK 128
#define OP_LIGHTNING_INDEXER_NH 64
struct metal_device {
    struct {
        bool has_simdgroup_mm, has_simdgroup_reduction, has_bfloat;
        size_t max_theadgroup_memory_size;
    } props;
};
typedef const metal_device * ggml_metal_device_t;
static bool ggml_metal_op_mul_mat_use_fwht(const ggml_tensor *, size_t) {
    return false;
}
static bool ggml_metal_op_mul_mat_id_use_mm(const ggml_tensor *, bool) {
    return false;
}

//TABLES//

struct node {
    std::string name;
    ggml_tensor * tensor;
};

struct nodes {
    ggml_context * ctx;
    std::vector<node> all;

    ggml_tensor * input(ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1) const {
        return ggml_new_tensor_3d(ctx, type, ne0, ne1, ne2);
    }

    ggml_tensor * add(const std::string & name, ggml_tensor * tensor) {
        all.push_back({name, tensor});
        return tensor;
    }
};

static const int64_t N_EMBD = 256, N_ROWS = 64, N_HEAD = 4, N_KV = 128, STRIDE = 16;

// llama-pop-graph.cpp and llama-pop-build.h
static void add_states(nodes & n) {
    ggml_tensor * states = n.input(GGML_TYPE_F32, N_EMBD, N_ROWS);
    ggml_tensor * ids    = n.input(GGML_TYPE_I32, N_ROWS, 1);
    n.add("input's view", ggml_view_1d(n.ctx, ids, N_ROWS, 0));
    ggml_tensor * row_ids = n.add("rows' view", ggml_view_2d(n.ctx, ids, 8, 1, ids->nb[1], 0));
    n.add("full rows", ggml_get_rows(n.ctx, states, row_ids));

    // Gemma 3n's states have one more dimension.
    ggml_tensor * streams = n.input(GGML_TYPE_F32, N_EMBD, 4, N_ROWS);
    ggml_tensor * some    = n.add("streams' view", ggml_view_3d(n.ctx, streams, N_EMBD, 4, N_ROWS / 2, streams->nb[1], streams->nb[2], 0));
    ggml_tensor * copy    = n.add("streams' copy", ggml_cont(n.ctx, ggml_permute(n.ctx, some, 0, 2, 1, 3)));
    ggml_tensor * flat    = n.add("flat streams", ggml_reshape_2d(n.ctx, copy, N_EMBD * 4, N_ROWS / 2));
    n.add("full streams", ggml_reshape_3d(n.ctx, ggml_get_rows(n.ctx, flat, row_ids), N_EMBD, 4, 8));
    n.add("snapshot", ggml_cont(n.ctx, states));
}

// llama-pop-fit.cpp
static void add_fit(nodes & n, ggml_type type) {
    const std::string of = std::string(" ") + ggml_type_name(type);
    ggml_tensor * states = n.input(GGML_TYPE_F32, N_EMBD, N_ROWS);
    ggml_tensor * weight = n.input(type, N_EMBD, 128);
    ggml_tensor * normed = n.add("normed" + of, ggml_mul(n.ctx, states, n.input(GGML_TYPE_F32, N_EMBD)));
    ggml_tensor * gate   = n.add("product" + of, ggml_mul_mat(n.ctx, weight, normed));
    ggml_tensor * up     = ggml_mul_mat(n.ctx, weight, normed);
    n.add("swiglu" + of, ggml_swiglu_split(n.ctx, gate, up));
    ggml_tensor * neurons  = n.add("neurons" + of, ggml_clamp(n.ctx, n.add("geglu" + of, ggml_geglu_split(n.ctx, gate, up)), -5, 5));
    ggml_tensor * ids      = n.input(GGML_TYPE_I32, N_ROWS, 1);
    ggml_tensor * previous = n.add("previous" + of, ggml_get_rows(n.ctx, gate, ggml_view_2d(n.ctx, ids, N_ROWS, 1, ids->nb[1], 0)));
    ggml_tensor * wide     = n.add("wide" + of, ggml_concat(n.ctx, previous, neurons, 0));
    ggml_tensor * fitted   = n.add("wide product" + of, ggml_mul_mat(n.ctx, n.input(type, 256, 128), wide));
    fitted                 = n.add("sum" + of, ggml_add(n.ctx, fitted, gate));
    fitted                 = n.add("bias" + of, ggml_add(n.ctx, fitted, n.input(GGML_TYPE_F32, 128)));
    n.add("heads" + of, ggml_reshape_3d(n.ctx, fitted, 32, N_HEAD, N_ROWS));
}

// llama-pop-taps.cpp
static void add_taps(nodes & n, ggml_type mask_type) {
    const std::string of = std::string(" with mask ") + ggml_type_name(mask_type);
    ggml_tensor * q      = n.input(GGML_TYPE_F32, 64, N_HEAD, N_ROWS);
    ggml_tensor * k      = n.input(GGML_TYPE_F32, 64, N_HEAD, N_KV);
    ggml_tensor * mask   = n.input(mask_type, N_KV, N_ROWS);
    n.add("tap" + of, ggml_cont_2d(n.ctx, ggml_permute(n.ctx, k, 0, 2, 1, 3), 64 * N_HEAD, N_KV));

    const int64_t n_rows = N_ROWS / STRIDE;
    ggml_tensor * q_view = ggml_view_3d(n.ctx, q, 64, N_HEAD, n_rows, q->nb[1], q->nb[2] * STRIDE, 0);
    ggml_tensor * q_rows = n.add("tapped rows" + of, ggml_cont(n.ctx, q_view));
    ggml_tensor * m_view = ggml_view_2d(n.ctx, mask, N_KV, n_rows, mask->nb[1] * STRIDE, 0);
    ggml_tensor * m_rows = n.add("tapped mask" + of, ggml_cont(n.ctx, m_view));

    ggml_tensor * kq = ggml_mul_mat(n.ctx, ggml_permute(n.ctx, k, 0, 2, 1, 3), ggml_permute(n.ctx, q_rows, 0, 2, 1, 3));
    ggml_prec_set_acc(n.add("scores" + of, kq), GGML_PREC_F32);
    ggml_tensor * capped = n.add("cap" + of, ggml_tanh(n.ctx, n.add("scaled" + of, ggml_scale(n.ctx, kq, 0.5f))));
    kq = n.add("softmax" + of, ggml_soft_max_ext(n.ctx, ggml_scale(n.ctx, capped, 2.0f), m_rows, 0.1f, 0.0f));
    ggml_tensor * heads = n.add("heads first" + of, ggml_cont(n.ctx, ggml_permute(n.ctx, kq, 1, 2, 0, 3)));
    n.add("mass" + of, ggml_sum_rows(n.ctx, heads));
}

// Nodes that no hook adds and that some backend lacks: the tables must reject them.
static void add_unsupported(nodes & n) {
    ggml_tensor * states = n.input(GGML_TYPE_F32, N_EMBD, N_ROWS);
    n.add("unsupported product", ggml_mul_mat(n.ctx, n.input(GGML_TYPE_TQ1_0, N_EMBD, 128), states));
    n.add("unsupported types", ggml_mul(n.ctx, states, n.input(GGML_TYPE_BF16, N_EMBD)));
}

int main() {
    ggml_init_params params = {1 << 20, nullptr, true};
    nodes n = {ggml_init(params), {}};
    add_states(n);
    for (ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
        add_fit(n, type);
    }
    add_taps(n, GGML_TYPE_F32);
    add_taps(n, GGML_TYPE_F16);
    add_unsupported(n);

    ggml_backend_cuda_device_context context = {0};
    ggml_backend_device cuda = {};
    cuda.context = &context;
    const metal_device metal = {{true, true, true, 32768}};
    const metal_device metal_without_bf16 = {{true, true, false, 32768}};
    for (const node & each : n.all) {
        printf("%s\t%s\t%d\t%d\t%d\n", each.name.c_str(), ggml_op_desc(each.tensor),
            ggml_backend_cuda_device_supports_op(&cuda, each.tensor),
            ggml_metal_device_supports_op(&metal, each.tensor),
            ggml_metal_device_supports_op(&metal_without_bf16, each.tensor));
    }
    ggml_free(n.ctx);
}
