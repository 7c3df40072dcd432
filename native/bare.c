#define _GNU_SOURCE
#include "bare.h"

#include "codec.h"
#include "uffd.h"
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define MESSAGES 16

struct server {
    const struct us_bare *bare;
    const struct us_bare_source *source;
    _Alignas(US_PAGE) uint8_t page[US_PAGE];
};

int us_bare_open(struct us_bare *bare, uint64_t pages)
{
    const uint64_t size = pages * US_PAGE;
    uint64_t granted;

    *bare = (struct us_bare){.pages = pages};
    const int uffd = us_uffd_open(false, US_FEATURE_PAGEFAULT_WP, &granted);
    if (uffd < 0)
        return uffd;
    bare->uffd = uffd;
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        const int error = errno;
        close(uffd);
        return -error;
    }
    bare->memory = memory;
    madvise(memory, size, MADV_NOHUGEPAGE); /* refused only where the kernel has no huge pages */
    const int rc = us_uffd_register(uffd, (uint64_t)(uintptr_t)memory, size, US_MODE_MISSING | US_MODE_WP);
    if (rc)
        us_bare_close(bare);
    return rc;
}

void us_bare_close(struct us_bare *bare)
{
    munmap(bare->memory, bare->pages * US_PAGE);
    close(bare->uffd);
    bare->memory = NULL;
    bare->uffd = -1;
}

/* Puts what belongs at `index` into the server's page. */
static int fetch(struct server *server, uint64_t index)
{
    const struct us_bare_source *source = server->source;
    if (!source->stored)
        return 0; /* all zeros, as it began */
    const uint64_t offset = source->offsets[index];
    const uint32_t size = (uint32_t)(source->offsets[index + 1] - offset);
    return us_decompress(source->codec, source->stored + offset, size, server->page);
}

static int answer(struct server *server, const struct us_uffd_message *message)
{
    const struct us_bare *bare = server->bare;
    const uint64_t address = message->address & ~(uint64_t)(US_PAGE - 1);
    uint64_t done;

    if (message->flags & US_FAULT_WP)
        return us_uffd_unprotect(bare->uffd, address, US_PAGE);
    int rc = fetch(server, (address - (uint64_t)(uintptr_t)bare->memory) / US_PAGE);
    if (rc)
        return rc;
    rc = us_uffd_copy(bare->uffd, address, server->page, US_PAGE, message->flags & US_FAULT_WRITE ? 0 : US_COPY_WP, &done);
    if (rc == -EEXIST) /* two threads came for one page; a failed copy wakes nobody */
        return us_uffd_wake(bare->uffd, address, US_PAGE);
    return rc;
}

/* Reads and answers what is there: 0 or -errno. */
static int serve(struct server *server)
{
    struct us_uffd_message messages[MESSAGES];
    const ssize_t length = read(server->bare->uffd, messages, sizeof messages);
    if (length < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    const int count = (int)((size_t)length / sizeof *messages);
    for (int i = 0; i < count; i++) {
        const int rc = answer(server, &messages[i]);
        if (rc)
            return rc;
    }
    return 0;
}

int us_bare_serve(const struct us_bare *bare, const struct us_bare_source *source, int32_t parent)
{
    struct server server = {.bare = bare, .source = source};
    struct pollfd wait = {.fd = bare->uffd, .events = POLLIN};

    /* A userfaultfd does not tell of its process's end. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != parent)
        return -ESRCH;
    for (;;) {
        if (poll(&wait, 1, -1) < 0 && errno != EINTR)
            return -errno;
        const int rc = serve(&server);
        if (rc)
            return rc;
    }
}
