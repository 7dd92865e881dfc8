// Work shared among threads.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "vectors.h"

static const i64 SMALL = 1 << 15;  // fewer numbers than these are not worth a second thread

// A job is cut into chunks, which whoever is free takes. The caller takes them too, and waits for
// nobody who has not begun: on a busy machine a thread's turn may come many milliseconds late.

struct Pool {
    std::atomic<uint64_t> ticket{0};  // job's number << 32 | chunks not taken yet
    std::atomic<uint32_t> done{0};
    std::atomic<int> asleep{0};
    void (*run)(const void*, i64) = nullptr;  // these three stand still while a chunk is taken
    const void* what = nullptr;
    uint32_t chunks = 0;
    std::mutex caller, bed;
    std::condition_variable alarm;
    int workers = 0;

    bool left() { return (uint32_t)ticket.load(); }

    bool take() {  // one chunk; a ticket of an earlier job cannot be taken for one of this
        uint64_t mine = ticket.load();
        while ((uint32_t)mine)
            if (ticket.compare_exchange_weak(mine, mine - 1)) {
                run(what, chunks - (uint32_t)mine);
                done.fetch_add(1);
                return true;
            }
        return false;
    }

    void work() {  // awake for a while after a job, since within a step the next one is near
        for (;;) {
            auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
            while (!left() && std::chrono::steady_clock::now() < until) pause();
            if (!left()) {
                std::unique_lock<std::mutex> lying(bed);
                asleep++;
                alarm.wait(lying, [this] { return left(); });
                asleep--;
            }
            while (take()) {}
        }
    }

    void share(uint32_t count, int threads, void (*f)(const void*, i64), const void* with) {
        for (; workers < threads - 1; workers++) std::thread([this] { work(); }).detach();
        run = f, what = with, chunks = count, done = 0;
        ticket = ((ticket.load() >> 32) + 1) << 32 | count;
        if (asleep) {
            std::lock_guard<std::mutex> lying(bed);
            alarm.notify_all();
        }
        while (take()) {}
        for (int i = 0; done < count; i++) i < 1000 ? pause() : (void)sched_yield();
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
};

inline Pool& pool() {  // one for all units
    static Pool* one = new Pool;  // never destroyed: its threads outlive everything
    return *one;
}

// f(first, last) over parts of 0 … count. Calls from two threads at once: one works alone.
template <typename F>
static void split(i64 count, int threads, F f) {
    i64 parts = std::min<i64>(count, threads * 6);
    std::unique_lock<std::mutex> mine(pool().caller, std::defer_lock);
    if (threads < 2 || parts < 2 || !mine.try_lock()) return f(0, count);
    auto part = [&](i64 i) { f(count * i / parts, count * (i + 1) / parts); };
    pool().share((uint32_t)parts, threads,
                 [](const void* with, i64 i) { (*(const decltype(part)*)with)(i); }, &part);
}
