/*
 * Trains an artifact on images in memory, a step at a time, and saves it as a run folder.
 *
 *     cc finetune.c -o finetune $(pkg-config --cflags --libs edge_bcs)
 *     ./finetune out/board images.u8 labels.u8 20 out/run
 *
 * images.u8 holds the bytes of images [N, C, H, W], labels.u8 a byte for each. Called with out/run in the place of out/board it
 * goes on with a training that was interrupted.
 */
#include <edge_bcs.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

/* The content of a file; NULL if it cannot be read. */
static unsigned char* content_of(const char* path, size_t* size) {
  unsigned char* content = NULL;
  FILE* file = fopen(path, "rb");
  if (file == NULL) return NULL;
  if (fseek(file, 0, SEEK_END) == 0) {
    const long length = ftell(file);
    rewind(file);
    content = length > 0 ? malloc((size_t)length) : NULL;
    *size = length > 0 ? (size_t)length : 0;
    if (content != NULL && fread(content, 1, *size, file) != *size) {
      free(content);
      content = NULL;
    }
  }
  fclose(file);
  return content;
}

/* Images that lie in memory, and the order in which an epoch shows them. */
struct data {
  const unsigned char *images, *labels;
  const uint32_t* order;
  uint64_t first; /* place in the order at which the step begins */
  size_t pixels;
};

/* Reads some images of a step: no more than are attacked at once are ever in memory as numbers. */
static int read_images(void* user, uint64_t first, uint64_t count, float* images, int64_t* labels) {
  const struct data* data = user;
  for (uint64_t i = 0; i < count; ++i) {
    const uint32_t image = data->order[data->first + first + i];
    for (size_t pixel = 0; pixel < data->pixels; ++pixel)
      images[i * data->pixels + pixel] = (float)data->images[image * data->pixels + pixel] / 255.0f;
    labels[i] = data->labels[image];
  }
  return 0;
}

static edge_bcs_status train(edge_bcs_network* network, struct data* data, uint32_t* order, size_t count,
                             uint64_t steps, uint64_t save_steps) {
  edge_bcs_training training = EDGE_BCS_INIT(edge_bcs_training);
  edge_bcs_position position = EDGE_BCS_INIT(edge_bcs_position);
  uint64_t epoch = UINT64_MAX;
  training.images = count;
  training.steps = steps;
  training.augment = "none"; /* read_images changes nothing */
  training.resume = 1;
  edge_bcs_status status = edge_bcs_begin(network, &training);
  while (status == EDGE_BCS_OK) {
    edge_bcs_batch batch = EDGE_BCS_INIT(edge_bcs_batch);
    edge_bcs_step_result result = EDGE_BCS_INIT(edge_bcs_step_result);
    status = edge_bcs_get_position(network, &position);
    if (status != EDGE_BCS_OK || position.finished) break;
    if (position.epoch != epoch) {
      epoch = position.epoch;
      status = edge_bcs_order(network, epoch, order, count);
      if (status != EDGE_BCS_OK) break;
    }
    data->first = position.first;
    batch.count = position.count;
    batch.read = read_images;
    batch.user = data;
    status = edge_bcs_train(network, &batch, &result);
    if (status == EDGE_BCS_OK && save_steps != 0 && result.step % save_steps == 0)
      status = edge_bcs_save(network, NULL);
    if (status == EDGE_BCS_OK) printf("step %" PRIu64 " loss %.17g\n", result.step, result.loss);
  }
  return status == EDGE_BCS_OK ? edge_bcs_save(network, NULL) : status;
}

static int finetune(char** words, uint64_t save_steps, edge_bcs_network* network) {
  edge_bcs_info info = EDGE_BCS_INIT(edge_bcs_info);
  struct data data = {0};
  size_t bytes = 0, count = 0;
  uint32_t* order = NULL;
  unsigned char* images = content_of(words[2], &bytes);
  unsigned char* labels = content_of(words[3], &count);
  edge_bcs_status status = edge_bcs_get_info(network, &info);
  data.pixels = (size_t)info.channels * info.height * info.width;
  if (images == NULL || labels == NULL || bytes != count * data.pixels) {
    fprintf(stderr, "%s and %s are not images of %zu bytes and their labels\n", words[2], words[3],
            data.pixels);
    status = EDGE_BCS_ERROR;
  } else {
    order = malloc(count * sizeof *order);
    data.images = images;
    data.labels = labels;
    data.order = order;
    printf("%s: %" PRIu64 " connections, %s, arena of %" PRIu64 " bytes, %" PRIu32 " threads\n", info.name,
           info.connections, info.objective, info.arena_bytes, info.threads);
    status = order == NULL ? EDGE_BCS_NO_MEMORY : edge_bcs_save_into(network, words[5]);
    if (status == EDGE_BCS_OK)
      status = train(network, &data, order, count, (uint64_t)strtoull(words[4], NULL, 10), save_steps);
    if (status != EDGE_BCS_OK) fprintf(stderr, "%s\n", edge_bcs_last_error());
  }
  free(order);
  free(labels);
  free(images);
  return status == EDGE_BCS_OK ? 0 : 1;
}

int main(int count, char** words) {
  edge_bcs_options options = EDGE_BCS_INIT(edge_bcs_options);
  edge_bcs_network* network = NULL;
  if (count < 6 || edge_bcs_abi_version() != EDGE_BCS_ABI_VERSION) {
    fprintf(stderr, "usage: finetune ARTIFACT IMAGES LABELS STEPS RUN [THREADS [STEPS-BETWEEN-SAVES]]\n");
    return 2;
  }
  if (count > 6) options.threads = (uint32_t)strtoul(words[6], NULL, 10);
  if (edge_bcs_open(words[1], &options, &network) != EDGE_BCS_OK) {
    fprintf(stderr, "%s\n", edge_bcs_last_error());
    return 1;
  }
  const int failed = finetune(words, count > 7 ? (uint64_t)strtoull(words[7], NULL, 10) : 0, network);
  edge_bcs_close(network);
  return failed;
}
