// A full disk and missing rights, for as long as an object lives.
#pragma once

#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdlib>

namespace harness {

/// Files of this process cannot grow beyond `bytes` while it lives: the write fails as it does on a full disk.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : handler_(::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    ::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit before_{};
  sighandler_t handler_;
};

/// Root may write anywhere: while it lives the process is nobody.
class NotRoot {
 public:
  NotRoot() : was_root_(::geteuid() == 0 && ::seteuid(65534) == 0) {}
  ~NotRoot() {
    if (was_root_ && ::seteuid(0) != 0) ::abort();
  }

 private:
  bool was_root_;
};

}  // namespace harness
