/**
 * @file edge_bcs.h
 * Trains, measures and asks a compiled network: no Python, no ONNX Runtime, one block of memory.
 *
 *     edge_bcs_network *network = NULL;
 *     if (edge_bcs_open("out/board", NULL, &network) != EDGE_BCS_OK) puts(edge_bcs_last_error());
 *
 * What is opened is an artifact of `edge-bcs export`, or a run that was saved, here or by Python: both read and write the
 * same files, and on one machine the same training has the same bits, whoever does which part of it.
 *
 * **Memory.** `edge_bcs_open` takes what the handle ever needs: the arena, which holds every tensor and is the caller's if
 * one is given, and beside it some hundred kilobytes (names, the list of operators, threads). No step, answer, measurement or
 * save allocates anything, unless it fails; the few calls on an open handle that do say so.
 *
 * **Failure.** Every call that can fail returns an edge_bcs_status; `edge_bcs_last_error` then has one sentence. Nothing was
 * changed: a step is done whole or not at all. No C++ exception leaves the library.
 *
 * **Threads.** Any number of handles may be open at once, each with threads of its own. A handle is for one thread at a time;
 * another one gets EDGE_BCS_BUSY. A callback may not call the handle that calls it. Results do not depend on the number of
 * threads.
 *
 * **Versions.** Structs that the caller fills begin with their size; fields are only ever added at their ends, and 0 means what
 * it did before they were there. `EDGE_BCS_INIT(type)` makes one. Structs that the library fills begin with their size, too.
 */
#ifndef EDGE_BCS_H
#define EDGE_BCS_H

#include <stddef.h>
#include <stdint.h>

/** A struct of this header with its size and zeros: `edge_bcs_options options = EDGE_BCS_INIT(edge_bcs_options);` */
#ifdef __cplusplus
template <class Struct>
inline Struct edge_bcs_sized() {
  Struct made = Struct();
  made.size = sizeof made;
  return made;
}
#define EDGE_BCS_INIT(type) edge_bcs_sized<type>()
extern "C" {
#else
#define EDGE_BCS_INIT(type) {.size = sizeof(type)}
#endif

#ifndef EDGE_BCS_API
#define EDGE_BCS_API __attribute__((visibility("default")))
#endif

/** Of this header. The library's is `edge_bcs_abi_version()`; programs work with a library whose number is the same. */
#define EDGE_BCS_ABI_VERSION 1

/** An open network. */
typedef struct edge_bcs_network edge_bcs_network;

/** What became of a call. */
typedef enum edge_bcs_status {
  EDGE_BCS_OK = 0,
  EDGE_BCS_ERROR = 1,      /**< The input, a file or an argument cannot be used. */
  EDGE_BCS_NOT_FINITE = 2, /**< A pixel, the loss or a gradient is not finite: lower λ, or skip the batch. */
  EDGE_BCS_NO_MEMORY = 3,  /**< The machine has not the memory, or the caller's arena is too small. */
  EDGE_BCS_BUSY = 4,       /**< Another thread, or a callback, uses the handle. */
  EDGE_BCS_STOPPED = 5     /**< A callback asked to stop. */
} edge_bcs_status;

/** Version of the library's interface. */
EDGE_BCS_API uint32_t edge_bcs_abi_version(void);

/** Version of the library, such as "0.2.0". */
EDGE_BCS_API const char* edge_bcs_version(void);

/**
 * Why the last call of this thread that failed did so: one sentence of UTF-8, without control characters. Empty if none
 * failed. Valid until the thread's next call that fails.
 */
EDGE_BCS_API const char* edge_bcs_last_error(void);

/* ---- Opening --------------------------------------------------------------------------------------------------------- */

/** How a network is opened. */
typedef struct edge_bcs_options {
  uint32_t size;    /**< sizeof(edge_bcs_options) */
  uint32_t threads; /**< The caller's among them, 1 to 1024; 0: as many as there are processors. */
  void*
      arena; /**< Memory that stays the caller's, from a multiple of 64 on; NULL: the library allocates it. */
  uint64_t
      arena_bytes; /**< Bytes of `arena`; with NULL a cap, 0 for none but what the artifact was exported for. */
  uint64_t seed;   /**< Of all randomness, if `seeded` is not 0; else the state's. */
  uint32_t seeded;
  uint32_t reserved; /**< 0 */
  const uint8_t*
      trusted_keys; /**< public keys of Ed25519, 32 bytes each: one of them must have signed the manifest,
                                    as `edge-bcs export --sign-key` does; NULL: nobody need */
  uint64_t trusted_count;
  uint64_t min_release;         /**< with trusted keys: the lowest release number that is taken */
  const char* attack_precision; /**< "f32"; "half", where the processor computes in it; "auto": half there;
                                   NULL: the artifact's, or what the run was begun with */
} edge_bcs_options;

/** A file of an artifact that lies in memory, by its name in the artifact's folder. */
typedef struct edge_bcs_file {
  const char* name;
  const void* data;
  size_t size;
} edge_bcs_file;

/**
 * Opens an artifact, which is a folder or a .tar that is read where it lies, or the folder of a saved run, of which the newest
 * intact state is read.
 *
 * @param folder   or .tar; UTF-8.
 * @param options  NULL for the defaults.
 * @param opened   set to the handle, or to NULL.
 * @return EDGE_BCS_ERROR if the folder is none, or any file of it is damaged, altered or hostile; EDGE_BCS_NO_MEMORY.
 */
EDGE_BCS_API edge_bcs_status edge_bcs_open(const char* folder, const edge_bcs_options* options,
                                           edge_bcs_network** opened);

/**
 * The same over files in memory: "manifest.json", "program.bin" and "state.safetensors", and others, which are not looked at.
 * The blocks may be freed afterwards. Such a handle cannot make run folders: `edge_bcs_state_write` keeps its state.
 */
EDGE_BCS_API edge_bcs_status edge_bcs_open_files(const edge_bcs_file* files, size_t count,
                                                 const edge_bcs_options* options, edge_bcs_network** opened);

/** Bytes of arena that the network of a folder, or of a .tar, needs. Reads the manifest and the program's first table. */
EDGE_BCS_API edge_bcs_status edge_bcs_arena_bytes(const char* folder, uint64_t* bytes);

/** Closes a handle and frees what it took; NULL is none. No other thread may use it. */
EDGE_BCS_API void edge_bcs_close(edge_bcs_network* network);

/** What a network is. Texts live as long as the handle. */
typedef struct edge_bcs_info {
  uint32_t size;     /**< in: sizeof(edge_bcs_info) */
  uint32_t channels; /**< of an image */
  uint32_t height;
  uint32_t width;
  uint32_t classes;            /**< outputs */
  uint32_t named;              /**< 1 if the classes have names, see edge_bcs_class_name */
  uint32_t micro_batch;        /**< images that are trained on at once */
  uint32_t batch_size;         /**< images of a step, unless the caller decides otherwise */
  uint32_t threads;            /**< of this handle */
  uint32_t attack_steps;       /**< of the training's attack */
  uint64_t connections;        /**< κ, which never changes */
  uint64_t positions;          /**< N, of which κ are connections */
  uint64_t working_set_bytes;  /**< that the compiler predicted */
  uint64_t arena_bytes;        /**< of memory in which it lies, holes included */
  uint64_t budget_bytes;       /**< that it was exported for; 0: none */
  uint64_t state_bytes;        /**< of a saved state, at most */
  uint64_t release;            /**< number that its maker gave it; 0: none */
  uint64_t seed;               /**< of the randomness of this handle */
  double epsilon;              /**< radius of the attack, in pixels of [0, 1] */
  double step_size;            /**< of the training's attack */
  const char* name;            /**< e.g. "resnet18" */
  const char* objective;       /**< "natural", "at", "mixed", "trades", "rst" or "mart" */
  const char* batch_norm;      /**< "frozen" or "batch" */
  const char* sparsity;        /**< e.g. "0.99" */
  const char* resize;          /**< how image files are brought to size: "squash", "crop" or "crop:SHARE" */
  const char* trained;         /**< what learns: "all", "head", "last:N", "norm" or "bias" */
  const char* instruction_set; /**< of the kernels: "avx512", "avx2", "neon" or "scalar" */
  uint64_t bound_bytes;        /**< of the arena: buffers that hold something between calls */
  const char*
      attack_precision; /**< "f32" or "half": in which attacks are here; NULL: there is but the first */
  const char* attack;   /**< with which a training begins: "pgd", or a single step, "fgsm-rs" or "n-fgsm" */
  uint32_t attack_micro_batch; /**< images that are attacked, and predicted, at once */
} edge_bcs_info;

/** Fills `info`. */
EDGE_BCS_API edge_bcs_status edge_bcs_get_info(const edge_bcs_network* network, edge_bcs_info* info);

/**
 * Finds the part of the arena in which nothing is kept between calls, nor while a reader reads images: memory to decode them
 * in, for one. What is written there is gone with the next call, or when the reader returns.
 */
EDGE_BCS_API edge_bcs_status edge_bcs_scratch(edge_bcs_network* network, void** memory, uint64_t* bytes);

/** What was lost: that the newest save was damaged, and which one is used; or why the best state is not. Empty if nothing was. */
EDGE_BCS_API const char* edge_bcs_warning(const edge_bcs_network* network);

/** Name of an output, UTF-8; NULL if it has none or `label` is none. Lives as long as the handle, or until names are given. */
EDGE_BCS_API const char* edge_bcs_class_name(const edge_bcs_network* network, uint32_t label);

/**
 * Names the outputs of a network that has no names, before `edge_bcs_save_into`, which keeps them. Allocates.
 * @param names as many as there are classes: UTF-8, distinct, at most 255 characters each.
 */
EDGE_BCS_API edge_bcs_status edge_bcs_name_classes(edge_bcs_network* network, const char* const* names,
                                                   size_t count);

/* ---- Images ---------------------------------------------------------------------------------------------------------- */

/**
 * Reads the images at the places [first, first + count) of a batch into memory of the library: `images` float
 * [count, C, H, W] in [0, 1], `labels` int64 [count]. `count` is at most `edge_bcs_info.attack_micro_batch`, so
 * that no more than that is ever in memory. Returns 0, or another number to end the call with EDGE_BCS_STOPPED.
 */
typedef int (*edge_bcs_reader)(void* user, uint64_t first, uint64_t count, float* images, int64_t* labels);

/** Images with their labels; their pixels come from one of `bytes`, `floats` and `read`. */
typedef struct edge_bcs_batch {
  uint32_t size;        /**< sizeof(edge_bcs_batch) */
  uint32_t reserved;    /**< 0 */
  uint64_t count;       /**< of images, at least 1 */
  const uint8_t* bytes; /**< [count, C, H, W], divided by 255 */
  const float* floats;  /**< [count, C, H, W] in [0, 1] */
  const int64_t*
      labels; /**< [count]; not needed to predict; −1: none, where the objective has a use for such images */
  edge_bcs_reader read;  /**< in the place of the three above */
  void* user;            /**< for `read` */
  const double* weights; /**< [count], of the images in the loss, at least 0; NULL: 1 each */
} edge_bcs_batch;

/**
 * Called after every micro-batch of a step or of a measurement, with images done and all of them. Returns 0, or another
 * number to end the call with EDGE_BCS_STOPPED: the step has then not been done.
 */
typedef int (*edge_bcs_progress)(void* user, uint64_t done, uint64_t all);

/** Sets the callback of a handle; NULL for none. */
EDGE_BCS_API edge_bcs_status edge_bcs_on_progress(edge_bcs_network* network, edge_bcs_progress progress,
                                                  void* user);

/* ---- Training -------------------------------------------------------------------------------------------------------- */

/** Facts of a step. Shares are NaN where they do not exist: no image has a label, or there is no attack. */
typedef struct edge_bcs_step_result {
  uint32_t size;     /**< in: sizeof(edge_bcs_step_result) */
  uint32_t reserved; /**< 0 */
  uint64_t step;     /**< its number, from 1 */
  uint64_t labelled; /**< images with a label */
  double loss;       /**< mean over the images */
  double accuracy;   /**< share of right answers, as the loss saw the images (clean, where it sees both) */
  double robust_accuracy; /**< the same of attacked images */
} edge_bcs_step_result;

/**
 * Trains on one batch of any size (Algorithm 1): attack, gradients, update, rewiring. The same bits as `Trainer.step`.
 * @param result NULL if it is of no interest.
 */
EDGE_BCS_API edge_bcs_status edge_bcs_step(edge_bcs_network* network, const edge_bcs_batch* batch,
                                           edge_bcs_step_result* result);

/** Numbers of an update. */
typedef struct edge_bcs_rates {
  uint32_t size;        /**< sizeof(edge_bcs_rates) */
  uint32_t reserved;    /**< 0 */
  double learning_rate; /**< λ */
  double weight_decay;  /**< λ_w, which is not multiplied by λ */
  double momentum;      /**< μ */
  double noise;         /**< σ; the noise has standard deviation λ·σ */
} edge_bcs_rates;

/** The rates of the next step; at first the artifact's. */
EDGE_BCS_API edge_bcs_status edge_bcs_get_rates(const edge_bcs_network* network, edge_bcs_rates* rates);
/** Sets them: finite numbers of at least 0. */
EDGE_BCS_API edge_bcs_status edge_bcs_set_rates(edge_bcs_network* network, const edge_bcs_rates* rates);

/** Steps that the state has behind it. */
EDGE_BCS_API uint64_t edge_bcs_steps(const edge_bcs_network* network);

/* ---- Asking ---------------------------------------------------------------------------------------------------------- */

/** Writes the probabilities of the classes, float [count, classes]; each row sums to 1. Labels are not looked at. */
EDGE_BCS_API edge_bcs_status edge_bcs_predict(edge_bcs_network* network, const edge_bcs_batch* batch,
                                              float* probabilities);

/** How a network is measured. */
typedef struct edge_bcs_measure {
  uint32_t size;         /**< sizeof(edge_bcs_measure) */
  uint32_t attack_steps; /**< of PGD with steps of 2.5·ε/attack_steps and a uniform start; 0: clean alone */
  uint32_t restarts;     /**< attacks, none of which may fool the network; 0 is 1 */
  uint32_t fgsm;         /**< 1: one step of size ε from the image itself */
  double epsilon;        /**< radius; below 0: the artifact's */
  int64_t*
      answers; /**< [count], set to what each image is taken for as it is, −1: nothing; NULL: not wanted */
  uint8_t*
      robust; /**< [count], set to 1 for images that are right as they are and under every attack; or NULL */
} edge_bcs_measure;

/** What was measured. */
typedef struct edge_bcs_measured {
  uint32_t size;     /**< in: sizeof(edge_bcs_measured) */
  uint32_t reserved; /**< 0 */
  uint64_t images;
  uint64_t right;        /**< answers, clean */
  uint64_t robust_right; /**< answers right both clean and under every attack; `right` where there is none */
  uint64_t unanswered;   /**< images whose answer is not finite: the training has diverged */
} edge_bcs_measured;

/** Counts right answers, clean and under attack. The same numbers as `Trainer.evaluate` without a limit. */
EDGE_BCS_API edge_bcs_status edge_bcs_evaluate(edge_bcs_network* network, const edge_bcs_batch* batch,
                                               const edge_bcs_measure* how, edge_bcs_measured* measured);

/* ---- State ----------------------------------------------------------------------------------------------------------- */

/**
 * Says which run folder `edge_bcs_save` saves into: a new one, or one that holds a run of this artifact. No other process may
 * write there until `edge_bcs_close`, or until another folder is said. Copies the artifact's files. Allocates.
 * @return EDGE_BCS_ERROR if something else lies there, if another process writes there or trained the run on, or if nothing
 *         can be written.
 */
EDGE_BCS_API edge_bcs_status edge_bcs_save_into(edge_bcs_network* network, const char* folder);

/**
 * Saves, atomically and durably: the folder is a complete artifact, and two slots keep the newest state and the one before,
 * one of which is intact whenever the power fails. Earlier saves are kept if it fails.
 * @param bytes set to those of the state; may be NULL.
 */
EDGE_BCS_API edge_bcs_status edge_bcs_save(edge_bcs_network* network, uint64_t* bytes);

/** Writes the state, the file `state.safetensors` of a run, into `memory` of at least `edge_bcs_info.state_bytes`. */
EDGE_BCS_API edge_bcs_status edge_bcs_state_write(edge_bcs_network* network, void* memory, size_t size,
                                                  size_t* written);

/** Takes a part of what is written: returns 0, or another number to end the call with EDGE_BCS_STOPPED. */
typedef int (*edge_bcs_writer)(void* user, const void* data, size_t size);

/** The same by a callback, part after part: for flash, or where there is no memory for all of it. */
EDGE_BCS_API edge_bcs_status edge_bcs_state_stream(edge_bcs_network* network, edge_bcs_writer write,
                                                   void* user);

/**
 * Replaces the state by one that was written, here or into a file of a run; step and seed are those that it names. If it is
 * not intact, or of another network, the handle keeps its own. Allocates.
 */
EDGE_BCS_API edge_bcs_status edge_bcs_state_read(edge_bcs_network* network, const void* memory, size_t size);

/** A tensor of the state where it lies in the arena. */
typedef struct edge_bcs_tensor {
  uint32_t size;     /**< in: sizeof(edge_bcs_tensor) */
  uint32_t integers; /**< 1 if elements are int32, 0 if they are float */
  uint64_t count;    /**< of elements */
  const void* data;  /**< to be read between steps */
} edge_bcs_tensor;

/**
 * Finds "coo.value", "coo.index", "coo.momentum", "dense.value", "dense.momentum", "batchnorm.mean" or
 * "batchnorm.variance".
 */
EDGE_BCS_API edge_bcs_status edge_bcs_get_tensor(const edge_bcs_network* network, const char* name,
                                                 edge_bcs_tensor* tensor);

/* ---- A whole training ------------------------------------------------------------------------------------------------ */

/** What a training over a data set is to be; 0 or NULL: what the saved one had, or the default. */
typedef struct edge_bcs_training {
  uint32_t size;   /**< sizeof(edge_bcs_training) */
  uint32_t resume; /**< 1: finish the training that the run was saved in, if it was; 0: begin another; 2: the
                             same, in the epoch after that training's last */
  uint64_t images; /**< of the data set, at least 1 */
  uint64_t epochs; /**< length in passes over the images, or … */
  uint64_t steps;  /**< … in steps; default: one epoch */
  uint64_t batch_size;  /**< images of a step; default: the artifact's */
  double learning_rate; /**< the highest λ, to which λ_w keeps its ratio; default: the artifact's */
  const char* schedule; /**< "steps", "cosine" or "one-cycle"; default: steps */
  const char* augment;  /**< "shift", "photo", "zoom", "mix", "mirror" or "none": kept with the run, done by
                          who reads; default: shift */
  double warmup;        /**< share of the steps in which λ rises, below 1, if `has_warmup` is 1 */
  uint32_t has_warmup;
  uint32_t
      balance; /**< 1: images are drawn so that the classes come up evenly, by who reads; 2: they are not */
  double
      validation; /**< share of the images, below 1, that is held out to choose the best epoch by, if `has_validation` is 1 */
  uint64_t patience; /**< with it: end after so many epochs that were no better */
  uint32_t has_validation;
  uint32_t has_confidence;
  uint64_t unlabelled; /**< images without labels that are trained on, too (robust self-training) */
  double confidence; /**< share from which on an answer is a label, if `has_confidence` is 1; default: 0.9 */
  double unlabelled_share;  /**< of a batch, below 1, that has no labels; default: a half */
  double unlabelled_weight; /**< of such an image in the loss, where a labelled one has 1; default: 1 */
} edge_bcs_training;

/** Where a training stands, and what its next step is. */
typedef struct edge_bcs_position {
  uint32_t size;        /**< in: sizeof(edge_bcs_position) */
  uint32_t finished;    /**< 1: no step is left */
  uint64_t done;        /**< steps of this training */
  uint64_t total;       /**< its length */
  uint64_t epoch;       /**< of the next step: the order of its images, see edge_bcs_order */
  uint64_t first;       /**< place of the next step's first image in that order */
  uint64_t count;       /**< of the next step's images */
  uint64_t skipped;     /**< steps left out because something was not finite */
  double learning_rate; /**< λ of the next step */
  const char* augment;  /**< how its images are changed as (seed, epoch, place in the data) say */
  uint32_t balance;     /**< 1: images are drawn so that the classes come up evenly */
  uint32_t measure; /**< 1: an epoch has ended, and the held-out images are to be measured: edge_bcs_note */
  uint64_t steps_per_epoch;
  uint64_t samples;   /**< images that are trained on; the others are held out, see edge_bcs_split */
  double validation;  /**< share of the images that is held out */
  uint64_t best_step; /**< of the best state so far */
  double best_score;  /**< its accuracy; −1: none was measured */
  const char* attack; /**< of the next step: "pgd", or a single step, "fgsm-rs" or "n-fgsm" */
  uint32_t watch;     /**< 1: the single step is to be looked at: edge_bcs_watch */
  uint32_t watched;   /**< images of such a look; 0: the training is not watched */
  int64_t
      fell_back; /**< steps done when the single step had collapsed, and PGD took its place; −1: it has not */
  uint64_t unlabelled;       /**< images without labels; 0: none, and the rest says nothing */
  uint64_t unlabelled_first; /**< of the next step, in endless passes over them: number k is image k % n of
                                pass k / n; `first` is that of the labelled ones then, and `count` theirs */
  uint64_t unlabelled_count; /**< of the next step, those without a label among them */
  double unlabelled_weight;  /**< in the loss, where a labelled image has 1 */
  double confidence;         /**< from which on an answer is a label */
  int64_t labelled_epoch;    /**< in which they were labelled last; −1: they were not */
  uint32_t label;            /**< 1: an epoch begins, and they are to be labelled: edge_bcs_label */
  uint32_t keeps_all; /**< 1: those without a label are trained on, too, with the label −1; 0: left out */
} edge_bcs_position;

/**
 * Begins a training, or goes on with the one that the run was saved in: `edge_bcs_save` keeps it, and Python's `Trainer.resume`
 * goes on with it. One with held-out images needs a run folder (`edge_bcs_save_into`), where the best state is kept. One with
 * unlabelled images saves their labels: `edge_bcs_info.state_bytes` is then more. Allocates.
 */
EDGE_BCS_API edge_bcs_status edge_bcs_begin(edge_bcs_network* network, const edge_bcs_training* training);

/** Where it stands. */
EDGE_BCS_API edge_bcs_status edge_bcs_get_position(const edge_bcs_network* network,
                                                   edge_bcs_position* position);

/**
 * Writes the order of an epoch's images, a permutation of [0, count): the same as Python's.
 * @param order uint32 [count].
 */
EDGE_BCS_API edge_bcs_status edge_bcs_order(const edge_bcs_network* network, uint64_t epoch, uint32_t* order,
                                            size_t count);

/**
 * Writes which of `count` images are trained on, ascending, and behind them those that are held out: as many as `samples` of the
 * position, and the rest. Orders, batches and draws then count from 0 among those that are trained on.
 * @param places uint32 [count].
 */
EDGE_BCS_API edge_bcs_status edge_bcs_split(const edge_bcs_network* network, uint32_t* places, size_t count);

/** What became of a measurement. */
typedef struct edge_bcs_noted {
  uint32_t size;         /**< in: sizeof(edge_bcs_noted) */
  uint32_t best;         /**< 1: the state is the best one */
  uint64_t saved_bytes;  /**< by a save; 0: none was needed */
  uint64_t copied_bytes; /**< by keeping it as the best one; 0 where it could be linked */
} edge_bcs_noted;

/**
 * Notes the accuracy of the held-out images, under attack where the training has one, when the position says that it is to be
 * measured; no step is done before. The best state is saved, and kept in the run folder beside the slots.
 * @param noted NULL if it is of no interest.
 */
EDGE_BCS_API edge_bcs_status edge_bcs_note(edge_bcs_network* network, double accuracy, edge_bcs_noted* noted);

/**
 * Lets a training that is finished end with its best state; the newest stays if that cannot be read (`best` is then 0, and
 * edge_bcs_warning says why). Saves what it replaces, not what it returns to: `edge_bcs_save` does. Allocates.
 */
EDGE_BCS_API edge_bcs_status edge_bcs_return_to_best(edge_bcs_network* network, edge_bcs_noted* noted);

/**
 * Writes which images a training with a single-step attack is watched on, where the position says of how many: some of those
 * that are held out, or of the others where these are too few.
 * @param places uint32 [count], `count` being the images of the whole data set; the first `watched` are set to their places.
 */
EDGE_BCS_API edge_bcs_status edge_bcs_watched_places(const edge_bcs_network* network, uint32_t* places,
                                                     size_t count);

/** What a look at a single-step attack has found. */
typedef struct edge_bcs_watched {
  uint32_t size;      /**< in: sizeof(edge_bcs_watched) */
  uint32_t collapsed; /**< 1: it is no attack any more; the training goes on with PGD */
  double own;         /**< share of the images that are right under it */
  double pgd;         /**< and under PGD-20 */
} edge_bcs_watched;

/**
 * Looks at a single-step attack when the position says so; no step is done before. It may collapse: the network learns to fool
 * the one step, and PGD fools it on every image (catastrophic overfitting).
 * @param batch the images that edge_bcs_watched_places names, with their labels.
 */
EDGE_BCS_API edge_bcs_status edge_bcs_watch(edge_bcs_network* network, const edge_bcs_batch* batch,
                                            edge_bcs_watched* watched);

/**
 * Lets the network, as it is, label the unlabelled images, when the position says so; no step is done before. Labels are answers
 * that it is sure of; they are saved with the state. `batch` has all of them, in an order that stays, and needs no labels.
 */
EDGE_BCS_API edge_bcs_status edge_bcs_label(edge_bcs_network* network, const edge_bcs_batch* batch);

/** Writes the order uint32 [count] of a pass over the unlabelled images, as edge_bcs_order of the others. */
EDGE_BCS_API edge_bcs_status edge_bcs_unlabelled_order(const edge_bcs_network* network, uint64_t pass,
                                                       uint32_t* order, size_t count);

/** Writes what the unlabelled images were taken for, int64 [count]; −1: the network is not sure. */
EDGE_BCS_API edge_bcs_status edge_bcs_pseudo_labels(const edge_bcs_network* network, int64_t* labels,
                                                    size_t count);

/** Does the next step of the training at the rates of its schedule; `batch` must have as many images as it says. */
EDGE_BCS_API edge_bcs_status edge_bcs_train(edge_bcs_network* network, const edge_bcs_batch* batch,
                                            edge_bcs_step_result* result);

/** Counts the next step as left out, after EDGE_BCS_NOT_FINITE. Refused when a whole epoch would be. */
EDGE_BCS_API edge_bcs_status edge_bcs_skip(edge_bcs_network* network);

#ifdef __cplusplus
}
#endif

#endif
