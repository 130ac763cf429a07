#include "cpu/parallel.h"

#include <omp.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>

#include "testing.h"

namespace fastgen::testing {
namespace {

// How many ranges [0, count) was cut into, each element visited once.
int ranges(int64_t count, int threads) {
    std::vector<std::atomic<int>> visits(count);
    std::atomic<int> calls{0};
    parallel_for(count, threads, [&](int64_t begin, int64_t end) {
        ++calls;
        for (int64_t i = begin; i < end; ++i) ++visits[i];
    });
    for (const auto& count_of_one : visits) CHECK(count_of_one == 1);
    return calls;
}

TEST(the_openmp_runtime_of_the_process_is_found) {
    CHECK(omp_get_max_threads() >= 1);  // the reference that links the runtime
    CHECK(strncmp(parallel_runtime(), "lib", 3) == 0);
}

TEST(a_range_is_cut_without_gaps_or_overlaps) {
    for (int64_t count : {0, 1, 2, 3, 7, 1000})
        for (int threads : {0, 1, 2, 3, 8})
            CHECK(ranges(count, threads) <= (threads ? threads : 1));
    CHECK(ranges(1000, 2) == 2);
}

TEST(inside_a_parallel_region_the_caller_works_alone) {
#pragma omp parallel num_threads(2)
    CHECK(ranges(100, 4) == 1);
}

TEST(a_child_after_fork_works_alone_and_does_not_hang) {
    CHECK(ranges(1000, 4) > 1);  // the pool exists
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(20);  // a hang ends by a signal
        _exit(ranges(1000, 4) == 1 ? 0 : 1);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(ranges(1000, 4) > 1);  // and the parent still has its threads
}

}  // namespace
}  // namespace fastgen::testing
