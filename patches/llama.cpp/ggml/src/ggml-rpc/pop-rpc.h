// limits of an RPC server: one client can neither block the others nor fill the memory

#pragma once

#include <cstdint>

struct ggml_pop_rpc_limits {
    int      hello_s   = 4;    // timeout of the handshake in seconds, shorter than the timeout of waiting pop-local clients
    int      message_s = 30;   // timeout in seconds without progress within a message or reply
    int      idle_s    = 600;  // time in seconds between commands after which a waiting client is served instead
    uint64_t memory    = UINT64_MAX; // total size of a client's buffers in bytes
};

inline ggml_pop_rpc_limits & ggml_pop_rpc() {
    static ggml_pop_rpc_limits limits;
    return limits;
}

// maximum message size in bytes, in addition to the client's buffers: tensors fit in these, and a graph is small
static const uint64_t GGML_POP_RPC_MESSAGE = 64u << 20;

inline void ggml_pop_rpc_set_limits(int hello_s, int idle_s, uint64_t memory) {
    ggml_pop_rpc().hello_s = hello_s;
    ggml_pop_rpc().idle_s  = idle_s;
    ggml_pop_rpc().memory  = memory;
}
