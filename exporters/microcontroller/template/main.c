/*
 * Trains the network on the images of data.c, saving into two slots of flash, and goes on where it was when the power failed.
 */
#include <edge_bcs.h>
#include <string.h>

#include "board.h"
#include "data.h"
#include "freestanding/memory.h"
#include "network.h"

#ifndef STEPS
#define STEPS 100 /* of the whole training */
#endif
#ifndef STEPS_BETWEEN_SAVES
#define STEPS_BETWEEN_SAVES 10
#endif
#ifndef MOST_IMAGES
#define MOST_IMAGES 2048 /* that data.c may have */
#endif

static uint32_t order[MOST_IMAGES];
static uint64_t first; /* place in the order at which a step begins */
static size_t pixels;  /* of an image */

static void print_number(uint64_t number) {
  char text[24];
  size_t at = sizeof text;
  text[--at] = '\0';
  do text[--at] = (char)('0' + number % 10);
  while ((number /= 10) != 0);
  board_print(text + at);
}

/* The bits of a number, so that nothing is lost on the way. */
static void print_bits(double number) {
  char text[17];
  uint64_t bits;
  memcpy(&bits, &number, sizeof bits);
  for (int i = 0; i < 16; ++i) text[i] = "0123456789abcdef"[bits >> (60 - 4 * i) & 15];
  text[16] = '\0';
  board_print(text);
}

static void print_fact(const char* name, uint64_t number) {
  board_print(name);
  board_print(" ");
  print_number(number);
  board_print("\n");
}

static int read_images(void* user, uint64_t at, uint64_t count, float* images, int64_t* labels) {
  const int training = user != NULL;
  for (uint64_t i = 0; i < count; ++i) {
    const size_t image = training ? order[first + at + i] : (size_t)(at + i);
    const unsigned char* from = (training ? training_images : test_images) + image * pixels;
    for (size_t pixel = 0; pixel < pixels; ++pixel) images[i * pixels + pixel] = (float)from[pixel] / 255.0f;
    labels[i] = (training ? training_labels : test_labels)[image];
  }
  return 0;
}

/* Steps that were done before. */
static edge_bcs_status train(edge_bcs_network* network) {
  edge_bcs_training training = EDGE_BCS_INIT(edge_bcs_training);
  edge_bcs_position position = EDGE_BCS_INIT(edge_bcs_position);
  uint64_t epoch = UINT64_MAX;
  training.images = training_count;
  training.steps = STEPS;
  training.augment = "none"; /* read_images changes nothing */
  training.resume = 1;
  edge_bcs_status status = edge_bcs_begin(network, &training);
  const edge_bcs_pool_use before = edge_bcs_get_pool_use();
  while (status == EDGE_BCS_OK) {
    edge_bcs_batch batch = EDGE_BCS_INIT(edge_bcs_batch);
    edge_bcs_step_result result = EDGE_BCS_INIT(edge_bcs_step_result);
    status = edge_bcs_get_position(network, &position);
    if (status != EDGE_BCS_OK || position.finished) break;
    if (position.epoch != epoch) {
      epoch = position.epoch;
      status = edge_bcs_order(network, epoch, order, training_count);
      if (status != EDGE_BCS_OK) break;
    }
    first = position.first;
    batch.count = position.count;
    batch.read = read_images;
    batch.user = order;
    status = edge_bcs_train(network, &batch, &result);
    if (status != EDGE_BCS_OK) break;
    board_print("step ");
    print_number(result.step);
    board_print(" loss ");
    print_bits(result.loss);
    board_print("\n");
    if (board_flash() != NULL &&
        (result.step % STEPS_BETWEEN_SAVES == 0 || position.done + 1 == position.total)) {
      if (slots_save(network, board_flash()) != SLOTS_OK) board_print("the state was not saved\n");
      print_fact("saved", result.step);
    }
  }
  print_fact("allocations of the training", edge_bcs_get_pool_use().calls - before.calls);
  return status;
}

static edge_bcs_status measure(edge_bcs_network* network) {
  edge_bcs_batch batch = EDGE_BCS_INIT(edge_bcs_batch);
  edge_bcs_measure how = EDGE_BCS_INIT(edge_bcs_measure);
  edge_bcs_measured measured = EDGE_BCS_INIT(edge_bcs_measured);
  if (test_count == 0) return EDGE_BCS_OK;
  batch.count = test_count;
  batch.read = read_images;
  how.attack_steps = 20;
  how.epsilon = -1;
  const edge_bcs_status status = edge_bcs_evaluate(network, &batch, &how, &measured);
  if (status != EDGE_BCS_OK) return status;
  print_fact("images", measured.images);
  print_fact("right", measured.right);
  print_fact("right under attack", measured.robust_right);
  return status;
}

int main(void) {
  edge_bcs_network* network = NULL;
  edge_bcs_info info = EDGE_BCS_INIT(edge_bcs_info);
  edge_bcs_status status = network_open(&network);
  if (status == EDGE_BCS_OK) status = edge_bcs_get_info(network, &info);
  if (status == EDGE_BCS_OK) {
    pixels = (size_t)info.channels * info.height * info.width;
    print_fact("arena", info.arena_bytes);
    print_fact("pool", edge_bcs_get_pool_use().most);
    if (training_count == 0 || training_count > MOST_IMAGES) {
      board_print("data.c has no images, or too many\n");
    } else {
      if (board_flash() != NULL && slots_load(network, board_flash()) == SLOTS_OK)
        print_fact("goes on from step", edge_bcs_steps(network));
      status = train(network);
      if (status == EDGE_BCS_OK) status = measure(network);
      print_fact("pool at most", edge_bcs_get_pool_use().most);
    }
  }
  if (status != EDGE_BCS_OK) {
    board_print(edge_bcs_last_error());
    board_print("\n");
  }
  edge_bcs_close(network);
  board_exit(status == EDGE_BCS_OK ? 0 : 1);
  return 0;
}
