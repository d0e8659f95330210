// waiting on the sockets of an RPC server, see pop-rpc.h. after the system's headers, and sockfd_t

#pragma once

#include "pop-rpc.h"

#include <algorithm>
#include <chrono>

#ifndef _WIN32
#  include <sys/select.h>
#  include <sys/time.h>
#endif

// how long it may send or take nothing
static void ggml_pop_rpc_set_patience(sockfd_t fd, int seconds) {
#ifdef _WIN32
    const DWORD patience = 1000*seconds;
#else
    const timeval patience = { seconds, 0 };
#endif
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, (const char *) &patience, sizeof(patience));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, (const char *) &patience, sizeof(patience));
}

// whether the client sends something, before another one has waited for it too long
static bool ggml_pop_rpc_wait(sockfd_t client, sockfd_t listening) {
    using clock = std::chrono::steady_clock;

    const auto deadline = clock::now() + std::chrono::seconds(ggml_pop_rpc().idle_s);
    while (true) {
        const auto left = std::chrono::duration_cast<std::chrono::seconds>(deadline - clock::now()).count();
        const bool is_late = clock::now() >= deadline;

        fd_set wanted;
        FD_ZERO(&wanted);
        FD_SET(client, &wanted);
        if (is_late) {
            FD_SET(listening, &wanted);
        }
        timeval until = { (long) left + 1, 0 };
        const int n = select((int) std::max(client, listening) + 1, &wanted, nullptr, nullptr, is_late ? nullptr : &until);
        if (n < 0 || FD_ISSET(client, &wanted)) {
            return n > 0;
        }
        if (n > 0) {
            GGML_LOG_ERROR("another client waits, and this one has been silent for %d s\n", ggml_pop_rpc().idle_s);
            return false;
        }
    }
}
