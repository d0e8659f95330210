// timeouts and waiting on the sockets of an RPC server, see pop-rpc.h. include it after the system's headers and sockfd_t

#pragma once

#include "pop-rpc.h"

#include <algorithm>
#include <chrono>

#ifndef _WIN32
#  include <sys/select.h>
#  include <sys/time.h>
#endif

// set the timeout of sending and receiving
static void ggml_pop_rpc_set_timeout(sockfd_t fd, int seconds) {
#ifdef _WIN32
    const DWORD timeout = 1000*seconds;
#else
    const timeval timeout = { seconds, 0 };
#endif
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, (const char *) &timeout, sizeof(timeout));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, (const char *) &timeout, sizeof(timeout));
}

// wait for the client's next command. return false if it disconnects, or idles too long while another client waits
static bool ggml_pop_rpc_wait(sockfd_t client, sockfd_t listening) {
    using clock = std::chrono::steady_clock;

    const auto deadline = clock::now() + std::chrono::seconds(ggml_pop_rpc().idle_s);
    while (true) {
        const auto left = std::chrono::duration_cast<std::chrono::seconds>(deadline - clock::now()).count();
        const bool is_late = clock::now() >= deadline;

        fd_set ready;
        FD_ZERO(&ready);
        FD_SET(client, &ready);
        if (is_late) {
            FD_SET(listening, &ready);
        }
        timeval until = { (long) left + 1, 0 };
        const int n = select((int) std::max(client, listening) + 1, &ready, nullptr, nullptr, is_late ? nullptr : &until);
        if (n < 0 || FD_ISSET(client, &ready)) {
            return n > 0;
        }
        if (n > 0) {
            GGML_LOG_ERROR("Closing a client that was idle for %d s: another one is waiting\n", ggml_pop_rpc().idle_s);
            return false;
        }
    }
}
