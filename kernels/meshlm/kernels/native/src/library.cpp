// What a library says about itself and about the CPU, and the pool's life.
#include <cstdlib>
#include <new>
#include <system_error>

#include "export.h"
#include "pairs.h"
#include "pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#ifndef MESHLM_SOURCES
#define MESHLM_SOURCES "unknown"
#endif

// build.py finds this mark in the file, so that a library which does not match its sources is never loaded.
EXPORT const char meshlm_sources[];
const char meshlm_sources[] = "meshlm-native-sources:" MESHLM_SOURCES ";";

// Which of the libraries this CPU and this operating system can run: 0 generic, 1 avx2 too, 2 avx512 too.
EXPORT int native_cpu_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned eax, ebx, ecx = 0, edx;
    bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return wide && __builtin_cpu_supports("avx512vnni") ? 2 : 1;
#else
    return 0;
#endif
}

// Whether this library keeps bfloat16 in pairs on this CPU (KV_BF16_PAIRS).
EXPORT int native_pair_products() { return has_pair_products(); }

// A team of `threads`, the caller of a step being one. Null where the system gives no thread or no memory.
EXPORT Pool* native_pool_create(int threads, int spin_us) {
    try {
        return new Pool(threads, spin_us);
    } catch (const std::system_error&) {
        return nullptr;
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

EXPORT void native_pool_destroy(Pool* pool) { delete pool; }
