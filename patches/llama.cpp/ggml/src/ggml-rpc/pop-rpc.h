// limits of an RPC server, so that one client neither keeps it from others nor fills its memory

#pragma once

#include <cstdint>

struct ggml_pop_rpc_limits {
    int      hello_s   = 4;    // less than the other clients of pop-local wait
    int      message_s = 30;   // without a byte of a message that has begun, or of an answer taken
    int      idle_s    = 600;  // between commands, while another client waits
    uint64_t memory    = UINT64_MAX; // of a client's buffers, bytes
};

inline ggml_pop_rpc_limits & ggml_pop_rpc() {
    static ggml_pop_rpc_limits limits;
    return limits;
}

// no tensor is larger than what was allocated for it; a graph is small
static const uint64_t GGML_POP_RPC_MESSAGE = 64u << 20;

inline void ggml_pop_rpc_set_limits(int hello_s, int idle_s, uint64_t memory) {
    ggml_pop_rpc().hello_s = hello_s;
    ggml_pop_rpc().idle_s  = idle_s;
    ggml_pop_rpc().memory  = memory;
}
