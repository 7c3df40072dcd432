#define US_EXERCISE_THREADS 16
#define US_EXERCISE_OWN 1
#define US_EXERCISE_ATOMIC 2
#define US_EXERCISE_LOCKED 4

struct us_exercise {
    uint8_t *memory;
    uint64_t pages;
    uint64_t steps;
    uint64_t seed;
    uint32_t kinds;
    uint32_t reads;
    uint32_t stride;
    uint32_t burst;
    uint32_t hot;
    uint32_t *own;
    uint32_t *atomic;
    uint32_t *locked;
    uint64_t done, lost, stop, first_lost_page;
};

void us_exercise_run(struct us_exercise *exercise, uint32_t thread);
void us_exercise_check(struct us_exercise *exercise);
