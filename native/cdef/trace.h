enum us_trace_kind { US_TRACE_READ, US_TRACE_WRITE, US_TRACE_PROTECT, US_TRACE_PHASE, US_TRACE_RESIDENT, ... };
enum us_trace_outcome {
    US_TRACE_UNKNOWN, US_TRACE_ZERO, US_TRACE_LOAD, US_TRACE_AWAITED, US_TRACE_RESCUE, US_TRACE_THERE, ...
};
struct us_trace_columns {
    uint32_t *page, *thread;
    uint64_t *time_ns;
    uint8_t *kind, *outcome;
};
#define US_TRACE_BLOCK_HEADER ...
#define US_TRACE_RECORD_MAX ...
uint64_t us_trace_pack(const struct us_trace_columns *from, uint64_t first, uint32_t count, uint8_t *block);
int64_t us_trace_look(const uint8_t *data, uint64_t bytes, uint64_t *length);
int us_trace_unpack(const uint8_t *block, const struct us_trace_columns *to, uint64_t first);
