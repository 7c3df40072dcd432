/* Trust: what is different where the client is a stranger, as a daemon's are.
 *
 * Such a client shares the channel with the pager and nothing else: neither the page table nor a pool.  What it writes in the channel
 * harms itself alone: result masks are cut to what was ordered, and which batch an order belongs to, and what it was, is kept here.
 * The batches' buffers are the pager's own, since a compressor must not read memory that changes under it, and nothing that the
 * pager writes to can be made to wait.
 */
#define _GNU_SOURCE
#include "pager.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BUFFERS_BYTES ((uint64_t)US_STAGING_PAGES * US_PAGE)

static uint8_t *buffer_of(uint8_t *base, uint32_t batch) { return base + (uint64_t)batch * US_BATCH_PAGES * US_PAGE; }

/* An event descriptor has one set of flags for all who hold it: a stranger could make our writes to it wait.  A pipe's ends have
 * their own.  We keep the agent's ends too: no end of ours ever says that there is no other. */
static int make_pipes(struct us_client *client) {
    int order[2], done[2];
    char path[32];
    if (pipe2(order, O_CLOEXEC | O_NONBLOCK))
        return -errno;
    if (pipe2(done, O_CLOEXEC | O_NONBLOCK)) {
        int rc = -errno;
        close(order[0]);
        close(order[1]);
        return rc;
    }
    close(client->order_fd);
    close(client->done_fd);
    client->agent_order = order[0];
    client->order_fd = order[1];
    client->done_fd = done[0];
    client->agent_done = done[1];
    snprintf(path, sizeof path, "/proc/self/fd/%d", done[1]);
    client->kick_fd = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
    return client->kick_fd < 0 ? -errno : 0;
}

/* Before us_client_start.  `copy_out`: never read the client's memory, but have the agent hand out what it moved: the number of a
 * process that runs for another user may become that of a program whose memory is not its own to show. */
int us_client_distrust(struct us_client *client, int copy_out) {
    void *own = mmap(NULL, BUFFERS_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (own == MAP_FAILED)
        return -errno;
    client->own_buffers = own;
    int rc = make_pipes(client);
    if (rc)
        return rc;
    client->copy_out = copy_out != 0;
    for (uint32_t i = 0; i < US_BATCHES; i++)
        client->batch[i].buffer = buffer_of(own, i);
    return 0;
}

/* The agent has copied a batch into the channel: take it from there, once. */
void us_take_copies(struct us_client *client, struct us_batch *batch) {
    if (!client->own_buffers)
        return;
    const uint8_t *shared = buffer_of((uint8_t *)client->channel + US_CHANNEL_BYTES, us_batch_number(batch));
    for (uint32_t i = 0; i < batch->pages; i++)
        if (batch->moved >> i & 1)
            memcpy(batch->buffer + (uint64_t)i * US_PAGE, shared + (uint64_t)i * US_PAGE, US_PAGE);
}

void us_trust_free(struct us_client *client) {
    if (!client->own_buffers)
        return;
    munmap(client->own_buffers, BUFFERS_BYTES);
    const int descriptor[] = {client->agent_order, client->agent_done, client->kick_fd};
    for (unsigned i = 0; i < sizeof descriptor / sizeof *descriptor; i++)
        if (descriptor[i] >= 0 && descriptor[i] != client->order_fd && descriptor[i] != client->done_fd)
            close(descriptor[i]);
}
