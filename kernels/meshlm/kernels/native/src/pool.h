// A team of threads that run one function together, step after step.
//
// Threads wait for work by spinning for a short while and then sleeping in the kernel; inside a step they meet at barriers
// that spin. Work is handed out unit by unit from a shared counter: when the machine takes a core away for a while, the
// other threads take over what is left.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#else
static inline void relax() { std::this_thread::yield(); }
#endif

class Pool;

// One thread's view of a running step.
class Member {
  public:
    Member(Pool& pool, int id) : pool_(pool), id_(id) {}
    int id() const { return id_; }
    int size() const;
    void barrier();

    // Calls body(begin, end) for pieces of [0, units), `grain` at a time, on whichever thread is free, and returns on every
    // thread when all are done. Every member calls it with the same `units` and `grain`.
    template <class Body>
    void share(int units, int grain, Body body);

    // The same without the wait at the end: what follows must not read what other threads write here.
    template <class Body>
    void share_on(int units, int grain, Body body);

  private:
    Pool& pool_;
    int id_;
    uint64_t phase_ = 0;
};

class Pool {
  public:
    using Step = void (*)(void* argument, Member& member);

    // Raises what std::thread raises where a thread cannot be had; the threads started before are joined.
    explicit Pool(int threads, int spin_us) : size_(threads), spin_(spin_us), counters_(new Counter[kCounters]) {
        try {
            for (int id = 1; id < threads; id++) threads_.emplace_back([this, id] { serve(id); });
        } catch (...) {
            stop();
            throw;
        }
    }
    ~Pool() { stop(); }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int size() const { return size_; }

    // Runs `step` on every thread, the caller's included, and returns when all have ended. One call at a time.
    void run(Step step, void* argument) {
        step_ = step;
        argument_ = argument;
        for (int i = 0; i < kCounters; i++) counters_[i].next.store(0, std::memory_order_relaxed);
        left_.store(size_ - 1, std::memory_order_relaxed);
        if (size_ > 1) {
            epoch_.fetch_add(1, std::memory_order_release);
            epoch_.notify_all();
        }
        Member member(*this, 0);
        step(argument, member);
        wait_until([this] { return left_.load(std::memory_order_acquire) == 0; });
    }

  private:
    friend class Member;
    static constexpr int kCounters = 4;  // used in turn: see Member::share_on
    static constexpr int kSpins = 4000;  // pauses before a waiting thread offers its core to others

    struct alignas(64) Counter {
        std::atomic<int> next{0};
    };

    template <class Condition>
    static void wait_until(Condition condition) {
        for (int spins = 0; !condition();) {
            relax();
            if (++spins > kSpins) std::this_thread::yield();
        }
    }

    void barrier() {
        if (size_ == 1) return;
        int sense = sense_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            sense_.store(sense + 1, std::memory_order_release);
        } else {
            wait_until([&] { return sense_.load(std::memory_order_acquire) != sense; });
        }
    }

    void serve(int id) {
        for (int seen = 0;;) {
            auto began = std::chrono::steady_clock::now();
            while (epoch_.load(std::memory_order_acquire) == seen) {
                for (int i = 0; i < 64 && epoch_.load(std::memory_order_relaxed) == seen; i++) relax();
                if (std::chrono::steady_clock::now() - began > spin_) epoch_.wait(seen);
            }
            seen = epoch_.load(std::memory_order_acquire);
            if (stopping_) return;
            Member member(*this, id);
            step_(argument_, member);
            left_.fetch_sub(1, std::memory_order_release);
        }
    }

    void stop() {
        stopping_ = true;
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
        for (auto& thread : threads_) thread.join();
        threads_.clear();
    }

    const int size_;
    const std::chrono::microseconds spin_;
    std::vector<std::thread> threads_;
    std::unique_ptr<Counter[]> counters_;
    Step step_ = nullptr;
    void* argument_ = nullptr;
    bool stopping_ = false;
    alignas(64) std::atomic<int> epoch_{0};
    alignas(64) std::atomic<int> left_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> sense_{0};
};

inline int Member::size() const { return pool_.size(); }

inline void Member::barrier() { pool_.barrier(); }

template <class Body>
void Member::share_on(int units, int grain, Body body) {
    // Counters are used in turn. The one two turns ahead is cleared here: members are at most one barrier apart, and every
    // second call at least must be a `share`, so nobody uses that one now.
    auto& mine = pool_.counters_[phase_ % Pool::kCounters].next;
    pool_.counters_[(phase_ + 2) % Pool::kCounters].next.store(0, std::memory_order_relaxed);
    phase_++;
    for (;;) {
        int begin = mine.fetch_add(grain, std::memory_order_relaxed);
        if (begin >= units) return;
        int end = begin + grain < units ? begin + grain : units;
        body(begin, end);
    }
}

template <class Body>
void Member::share(int units, int grain, Body body) {
    share_on(units, grain, body);
    barrier();
}
