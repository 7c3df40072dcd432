#include "probe.h"
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* Newer than the headers of the oldest distribution supported, hence our own. */
#define US_SYS_IO_URING_SETUP 425
#define US_SYS_PIDFD_OPEN 434
#define US_SYS_PROCESS_MADVISE 440
#define US_PR_GET_MEMORY_MERGE 68

_Static_assert(sizeof(struct us_probe_userfault) == 32, "as native/cdef/probe.h has it");

static int open_by_device(void) {
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0)
        return -errno;
    int fd = ioctl(device, US_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    int rc = fd < 0 ? -errno : fd;
    close(device);
    return rc;
}

static int open_by_syscall(int flags) {
    long fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | flags);
    return fd < 0 ? -errno : (int)fd;
}

/* Moves one page between two fresh mappings: only the destination need be registered. */
static int try_move(int fd) {
    const size_t size = (size_t)sysconf(_SC_PAGESIZE);
    uint8_t *pages = mmap(NULL, 2 * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED)
        return -errno;
    int rc = 0;
    /* A page of its own in each half, whatever the transparent huge page setting. EINVAL: a kernel without them. */
    if (madvise(pages, 2 * size, MADV_NOHUGEPAGE) < 0 && errno != EINVAL)
        rc = -errno;
    *(volatile uint8_t *)pages = 1;
    const uint64_t source = (uintptr_t)pages, target = source + size;
    uint64_t moved = 0;
    if (rc == 0)
        rc = us_uffd_register(fd, target, size, US_MODE_MISSING);
    if (rc == 0)
        rc = us_uffd_move(fd, target, source, size, &moved);
    munmap(pages, 2 * size);
    return rc;
}

void us_probe_userfault(struct us_probe_userfault *out) {
    memset(out, 0, sizeof(*out));
    int fds[3] = {open_by_device(), open_by_syscall(0), open_by_syscall(US_USER_MODE_ONLY)};
    out->device = fds[0] < 0 ? fds[0] : 0;
    out->syscall = fds[1] < 0 ? fds[1] : 0;
    out->user_mode = fds[2] < 0 ? fds[2] : 0;
    out->api = out->move = -ENOSYS;
    for (int i = 0; i < 3; i++) {
        if (fds[i] < 0)
            continue;
        struct us_uffd_api api = {.api = US_UFFD_API};
        out->api = ioctl(fds[i], US_IOC_API, &api) < 0 ? -errno : 0;
        if (out->api == 0) {
            out->features = api.features;
            out->move = try_move(fds[i]);
        }
        break;
    }
    for (int i = 0; i < 3; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

int us_probe_vectored_drop(void) {
    const size_t size = (size_t)sysconf(_SC_PAGESIZE);
    long pidfd = syscall(US_SYS_PIDFD_OPEN, getpid(), 0);
    if (pidfd < 0)
        return -errno;
    int rc = 0;
    uint8_t *pages = mmap(NULL, 2 * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) {
        rc = -errno;
    } else {
        struct iovec ranges[2] = {{.iov_base = pages, .iov_len = size}, {.iov_base = pages + size, .iov_len = size}};
        if (syscall(US_SYS_PROCESS_MADVISE, pidfd, ranges, 2, MADV_DONTNEED, 0) < 0)
            rc = -errno;
        munmap(pages, 2 * size);
    }
    close((int)pidfd);
    return rc;
}

static volatile uint32_t probe_word = 0x5357u;

/* The child that plays the pager: learns the other's pid from the pipe, reads one word, exits with its errno. */
static void read_sibling(int from) {
    pid_t pid = 0;
    uint32_t word = 0;
    if (read(from, &pid, sizeof(pid)) != sizeof(pid))
        _exit(EIO);
    struct iovec local = {.iov_base = &word, .iov_len = sizeof(word)};
    struct iovec remote = {.iov_base = (void *)(uintptr_t)&probe_word, .iov_len = sizeof(word)};
    ssize_t got = process_vm_readv(pid, &local, 1, &remote, 1, 0);
    if (got < 0)
        _exit(errno);
    _exit(got == sizeof(word) && word == probe_word ? 0 : EIO);
}

/* The child that plays the client: names its reader, says its pid, and stays until the parent kills it. */
static void await_reader(int to, pid_t reader) {
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    /* EINVAL where Yama is not: then nobody need be named. */
    prctl(PR_SET_PTRACER, (unsigned long)reader, 0, 0, 0);
    pid_t pid = getpid();
    if (write(to, &pid, sizeof(pid)) != sizeof(pid))
        _exit(1);
    for (;;)
        pause();
}

/* Two children, so that this process's own tracer setting stays as it is. After fork they make system calls only: the
 * parent may have threads. */
int us_probe_readv(void) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        return -errno;
    int rc = 0, status = 0;
    pid_t client = -1, reader = fork();
    if (reader == 0) {
        close(ends[1]); /* else the reader would keep its own pipe from ending */
        read_sibling(ends[0]);
    }
    if (reader > 0)
        client = fork();
    if (reader > 0 && client == 0)
        await_reader(ends[1], reader);
    if (reader < 0 || client < 0)
        rc = -errno;
    close(ends[0]);
    close(ends[1]);
    if (reader > 0) {
        while (waitpid(reader, &status, 0) < 0 && errno == EINTR)
            ;
        if (rc == 0)
            rc = WIFEXITED(status) ? -WEXITSTATUS(status) : -EIO;
    }
    if (client > 0) {
        kill(client, SIGKILL);
        while (waitpid(client, &status, 0) < 0 && errno == EINTR)
            ;
    }
    return rc;
}

int us_probe_io_uring(void) {
    uint64_t params[15] = {0}; /* struct io_uring_params: 120 bytes, all zero asks for the defaults */
    long fd = syscall(US_SYS_IO_URING_SETUP, 4, params);
    if (fd < 0)
        return -errno;
    close((int)fd);
    return 0;
}

int us_probe_merging(void) {
    int merging = prctl(US_PR_GET_MEMORY_MERGE, 0, 0, 0, 0);
    return merging < 0 ? -errno : merging;
}
