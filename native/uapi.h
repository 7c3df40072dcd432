/* The kernel's userfaultfd ABI, in our own words.
 *
 * Distributions ship headers older than the kernels they run (Debian 12: no MOVE, no POISON), so every constant and
 * structure that crosses into the kernel is written down here and its layout asserted.  Linux include/uapi/linux/userfaultfd.h.
 */
#ifndef US_UAPI_H
#define US_UAPI_H
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>

#define US_PAGE 4096u
#define US_PAGE_SHIFT 12

#define US_UFFD_API 0xAAull

#define US_FEATURE_PAGEFAULT_WP (1ull << 0)
#define US_FEATURE_SIGBUS (1ull << 7)
#define US_FEATURE_THREAD_ID (1ull << 8)
#define US_FEATURE_POISON (1ull << 14)
#define US_FEATURE_MOVE (1ull << 16)

#define US_EVENT_PAGEFAULT 0x12
#define US_FAULT_WRITE (1ull << 0)
#define US_FAULT_WP (1ull << 1)

#define US_MODE_MISSING (1ull << 0)
#define US_MODE_WP (1ull << 1)

#define US_COPY_DONTWAKE (1ull << 0)
#define US_COPY_WP (1ull << 1)
#define US_WP_PROTECT (1ull << 0)

/* flag of the userfaultfd system call: no privilege needed, no faults taken in the kernel are served */
#define US_USER_MODE_ONLY 1

struct us_uffd_api { uint64_t api, features, ioctls; };
struct us_uffd_range { uint64_t start, len; };
struct us_uffd_register { struct us_uffd_range range; uint64_t mode, ioctls; };
struct us_uffd_copy { uint64_t dst, src, len, mode; int64_t copy; };
struct us_uffd_protect { struct us_uffd_range range; uint64_t mode; };
struct us_uffd_poison { struct us_uffd_range range; uint64_t mode; int64_t updated; };
struct us_uffd_move { uint64_t dst, src, len, mode; int64_t move; };
struct us_uffd_message {
    uint8_t event, reserved1;
    uint16_t reserved2;
    uint32_t reserved3;
    uint64_t flags, address;
    uint32_t thread_id, reserved4;
};

_Static_assert(sizeof(struct us_uffd_api) == 24, "uffdio_api");
_Static_assert(sizeof(struct us_uffd_register) == 32, "uffdio_register");
_Static_assert(sizeof(struct us_uffd_copy) == 40 && offsetof(struct us_uffd_copy, copy) == 32, "uffdio_copy");
_Static_assert(sizeof(struct us_uffd_protect) == 24, "uffdio_writeprotect");
_Static_assert(sizeof(struct us_uffd_poison) == 32, "uffdio_poison");
_Static_assert(sizeof(struct us_uffd_move) == 40 && offsetof(struct us_uffd_move, move) == 32, "uffdio_move");
_Static_assert(sizeof(struct us_uffd_message) == 32 && offsetof(struct us_uffd_message, address) == 16, "uffd_msg");

#define US_IOC_API _IOWR(0xAA, 0x3F, struct us_uffd_api)
#define US_IOC_REGISTER _IOWR(0xAA, 0x00, struct us_uffd_register)
#define US_IOC_UNREGISTER _IOR(0xAA, 0x01, struct us_uffd_range)
#define US_IOC_WAKE _IOR(0xAA, 0x02, struct us_uffd_range)
#define US_IOC_COPY _IOWR(0xAA, 0x03, struct us_uffd_copy)
#define US_IOC_MOVE _IOWR(0xAA, 0x05, struct us_uffd_move)
#define US_IOC_PROTECT _IOWR(0xAA, 0x06, struct us_uffd_protect)
#define US_IOC_POISON _IOWR(0xAA, 0x08, struct us_uffd_poison)
/* /dev/userfaultfd: a file descriptor whose holder needs no capability */
#define US_IOC_NEW _IO(0xAA, 0x00)
#endif
