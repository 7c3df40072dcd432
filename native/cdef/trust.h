int us_client_distrust(struct us_client *client, int copy_out);
int64_t us_region_restore(struct us_region *region, uint64_t first, uint64_t count, uint64_t most);
int us_region_unregister(struct us_region *region);
void us_client_let_go(struct us_client *client);
