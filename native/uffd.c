#define _GNU_SOURCE
#include <stdbool.h>
#include "uffd.h"
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

static int open_descriptor(bool user_mode_only) {
    int flags = O_CLOEXEC | O_NONBLOCK;
    if (user_mode_only) {
        int fd = (int)syscall(SYS_userfaultfd, flags | US_USER_MODE_ONLY);
        return fd < 0 ? -errno : fd;
    }
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device >= 0) {
        int fd = ioctl(device, US_IOC_NEW, flags);
        close(device);
        if (fd >= 0)
            return fd;
    }
    int fd = (int)syscall(SYS_userfaultfd, flags);
    return fd < 0 ? -errno : fd;
}

/* The handshake may be made once per descriptor: the features the kernel has are asked of a throw-away one. */
int us_uffd_open(bool user_mode_only, uint64_t features, uint64_t *granted) {
    int probe = open_descriptor(user_mode_only);
    if (probe < 0)
        return probe;
    struct us_uffd_api api = {.api = US_UFFD_API};
    int rc = ioctl(probe, US_IOC_API, &api) ? -errno : 0;
    close(probe);
    if (rc)
        return rc;
    *granted = features & api.features;
    int fd = open_descriptor(user_mode_only);
    if (fd < 0)
        return fd;
    struct us_uffd_api want = {.api = US_UFFD_API, .features = *granted};
    if (ioctl(fd, US_IOC_API, &want)) {
        rc = -errno;
        close(fd);
        return rc;
    }
    return fd;
}
