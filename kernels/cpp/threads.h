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
static const int EVERYBODY = 1 << 10;

// as many threads as so many numbers are worth
static inline int at_most(int threads, i64 numbers) {
    return (int)std::min<i64>(threads, 1 + numbers / SMALL);
}

// A job is cut into chunks, which whoever is free takes. The caller takes them too, and waits for
// nobody who has not begun: on a busy machine a thread's turn may come many milliseconds late.
//
// A helper that comes late with what it has begun lost its core to somebody who wanted it too: in a
// server, to the process that speaks with the clients, which then was kept waiting as well. So for
// some jobs only those are shared that are worth several helpers; twice as many when it is late again.

typedef std::chrono::steady_clock Clock;
static const auto LATE = std::chrono::microseconds(100);
static const int WARY = 4;  // so many times the work, then, for each helper
static const int JOBS = 200, MOST_JOBS = 6400;

struct Pool {
    std::atomic<uint64_t> ticket{0};  // job's number << 32 | chunks not taken yet
    std::atomic<uint32_t> done{0};
    std::atomic<int> asleep{0};
    void (*run)(const void*, i64) = nullptr;  // these three stand still while a chunk is taken
    const void* what = nullptr;
    uint32_t chunks = 0;
    std::mutex caller, bed;
    std::condition_variable alarm;
    int workers = 0, most = 1;  // most: threads that may be used, the caller's included
    int wary = 0, spell = 0, calm = 0;  // jobs: still to be wary for, of the last spell, and since it

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
            auto until = Clock::now() + std::chrono::microseconds(100);
            while (!left() && Clock::now() < until) pause();
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
        const auto began = Clock::now();
        i64 own = 1;
        while (take()) own++;
        const auto ended = Clock::now();
        for (int i = 0; done < count; i++) i < 1000 ? pause() : (void)sched_yield();
        const auto waited = Clock::now() - ended;
        if (waited > LATE && waited * own > 2 * (ended - began))
            wary = spell = std::min(MOST_JOBS, std::max(JOBS, 2 * spell));
    }

    int crew(int worth) {  // of a job that is worth so many threads
        if (worth > 1 && wary > 0) {
            worth /= WARY;
            wary--, calm = 0;
        } else if (worth > 1 && ++calm > spell)
            spell = calm = 0;
        return std::min(worth, most);
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

extern "C" __attribute__((used)) inline void use_threads(int most) { pool().most = most; }

// f(first, last) over parts of 0 … count, which together are worth so many threads. Calls from two
// threads at once: one works alone.
template <typename F>
static void split(i64 count, int worth, F f) {
    if (worth < 2 || count < 2) return f(0, count);
    std::unique_lock<std::mutex> mine(pool().caller, std::try_to_lock);
    const int threads = mine ? pool().crew(worth) : 1;
    if (threads < 2) return f(0, count);
    i64 parts = std::min<i64>(count, threads * 6);
    auto part = [&](i64 i) { f(count * i / parts, count * (i + 1) / parts); };
    pool().share((uint32_t)parts, threads,
                 [](const void* with, i64 i) { (*(const decltype(part)*)with)(i); }, &part);
}
