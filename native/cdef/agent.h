struct us_agent;

struct us_agent_options {
    int channel_fd, uffd, staging_uffd;
    int order_fd;
    int done_fd;
    int pager_pidfd;
    int pager_pid;
    int abort_on_death;
};

int us_agent_open(bool user_mode_only, int *uffd, int *staging_uffd, uint64_t *features);
int us_agent_start(struct us_agent **out, const struct us_agent_options *options);
uint64_t us_agent_staging(const struct us_agent *agent);
int us_agent_tid(const struct us_agent *agent);
void us_agent_stop(struct us_agent *agent);
int us_agent_register(int uffd, uint64_t start, uint64_t bytes);
int us_agent_bar(uint64_t start, uint64_t bytes);
int us_agent_allow(int pid);
