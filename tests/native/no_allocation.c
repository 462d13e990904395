/* Trains, asks, measures and saves with a malloc that aborts: ARTIFACT IMAGES LABELS RUN. */
#define _GNU_SOURCE
#include <edge_bcs.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What glibc's own are called. */
extern void* __libc_malloc(size_t size);
extern void* __libc_calloc(size_t count, size_t size);
extern void* __libc_realloc(void* memory, size_t size);
extern void* __libc_memalign(size_t alignment, size_t size);

static volatile int forbidden, allocated;

static void allocate(void) {
  static const char text[] = "something was allocated\n";
  allocated = 1;
  if (!forbidden) return;
  if (write(2, text, sizeof text - 1) < 0) _exit(4);
  abort();
}

void* malloc(size_t size) {
  allocate();
  return __libc_malloc(size);
}
void* calloc(size_t count, size_t size) {
  allocate();
  return __libc_calloc(count, size);
}
void* realloc(void* memory, size_t size) {
  allocate();
  return __libc_realloc(memory, size);
}
void* memalign(size_t alignment, size_t size) {
  allocate();
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(size_t alignment, size_t size) {
  allocate();
  return __libc_memalign(alignment, size);
}
int posix_memalign(void** memory, size_t alignment, size_t size) {
  allocate();
  *memory = __libc_memalign(alignment, size);
  return *memory == NULL ? ENOMEM : 0;
}

static unsigned char images[1 << 16], labels[1 << 10], state[1 << 20];
static float probabilities[1 << 14];
static int64_t numbers[1 << 10];
static uint32_t order[1 << 10];

static size_t read_file(const char* path, unsigned char* into, size_t most) {
  FILE* file = fopen(path, "rb");
  if (file == NULL) exit(3);
  const size_t count = fread(into, 1, most, file);
  fclose(file);
  return count;
}

static void check(edge_bcs_status status) {
  if (status == EDGE_BCS_OK) return;
  fprintf(stderr, "%s\n", edge_bcs_last_error());
  exit(1);
}

int main(int words, char** word) {
  edge_bcs_options options = EDGE_BCS_INIT(edge_bcs_options);
  edge_bcs_training training = EDGE_BCS_INIT(edge_bcs_training);
  edge_bcs_batch batch = EDGE_BCS_INIT(edge_bcs_batch);
  edge_bcs_measure measure = EDGE_BCS_INIT(edge_bcs_measure);
  edge_bcs_measured measured = EDGE_BCS_INIT(edge_bcs_measured);
  edge_bcs_step_result result = EDGE_BCS_INIT(edge_bcs_step_result);
  edge_bcs_position position = EDGE_BCS_INIT(edge_bcs_position);
  edge_bcs_info info = EDGE_BCS_INIT(edge_bcs_info);
  edge_bcs_network* network = NULL;
  size_t written = 0;
  if (words != 5) return 2;
  read_file(word[2], images, sizeof images);
  const size_t count = read_file(word[3], labels, sizeof labels);
  for (size_t i = 0; i < count; ++i) numbers[i] = labels[i];
  options.threads = 2;
  check(edge_bcs_open(word[1], &options, &network));
  check(edge_bcs_save_into(network, word[4]));
  training.images = count;
  training.steps = 4;
  training.batch_size = count;
  check(edge_bcs_begin(network, &training));
  batch.count = count;
  batch.bytes = images;
  batch.labels = numbers;
  measure.attack_steps = 2;
  measure.restarts = 2;
  measure.epsilon = -1;

  if (!allocated) return 5; /* nothing is watched */
  forbidden = 1;
  for (int i = 0; i < 2; ++i) {
    check(edge_bcs_get_info(network, &info));
    check(edge_bcs_get_position(network, &position));
    check(edge_bcs_order(network, position.epoch, order, count));
    check(edge_bcs_train(network, &batch, &result));
    check(edge_bcs_step(network, &batch, &result));
    check(edge_bcs_predict(network, &batch, probabilities));
    check(edge_bcs_evaluate(network, &batch, &measure, &measured));
    check(edge_bcs_save(network, NULL));
    check(edge_bcs_state_write(network, state, sizeof state, &written));
  }
  forbidden = 0;
  edge_bcs_close(network);
  return 0;
}
