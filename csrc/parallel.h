// Runs a loop on several threads. Threads live for one call: starting and ending one costs some 70 us, the loops here
// take milliseconds, and a process that forks keeps no dead pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace dfengine {

// Calls body(i) once for each i in [0, n), in no order. The first exception is rethrown in the caller after
// all threads have stopped.
template <typename Body>
void parallel_for(std::int64_t n, int threads, const Body& body) {
  std::atomic<std::int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&] {
    try {
      for (std::int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) body(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
      next.store(n);
    }
  };
  std::vector<std::thread> helpers;
  const std::int64_t wanted = threads < n ? threads : n;
  try {
    for (std::int64_t t = 1; t < wanted; ++t) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads are to be had (a limit of processes or of memory): those that there are do all of it.
  }
  work();
  for (auto& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace dfengine
