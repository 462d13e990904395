// edge-bcs-run predict.

#include <algorithm>
#include <array>
#include <numeric>

#include "app/commands.h"
#include "app/reading.h"
#include "app/shared_options.h"
#include "app/signals.h"
#include "app/text.h"

namespace edge_bcs::app {

namespace {

constexpr std::array options_of_predict{
    OptionSpec{"--top", "N", "Classes that are named for an image; default: 3."},
    class_names_option,
    memory_option,
    threads_option,
    trust_key_option,
    min_release_option,
    engine_option,
    OptionSpec{"--json", nullptr, "Print the answers as one JSON object."},
};

struct Asked {
  std::string file, why;
};

std::vector<Asked> asked_for(std::span<const std::string> words) {
  std::vector<Asked> asked;
  for (const std::string& word : words) {
    if (!is_folder(word)) {
      asked.push_back({word, {}});
      continue;
    }
    std::vector<std::string> files;
    try {
      files = images_below(word);
    } catch (const Error& error) {
      asked.push_back({word, error.what()});
      continue;
    }
    if (files.empty()) asked.push_back({word, "the folder " + plain(word) + " holds no image."});
    for (const std::string& file : files) asked.push_back({joined(word, file), {}});
  }
  return asked;
}

// The likeliest classes, the likeliest first.
Value::List named_answers(const Network& network, std::span<const float> row, std::size_t top) {
  std::vector<std::size_t> order(row.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, [&](std::size_t one, std::size_t other) { return row[one] > row[other]; });
  Value::List answers;
  for (std::size_t i = 0; i < std::min(top, order.size()); ++i) {
    Value answer;
    answer["name"] = network.class_name(order[i]);
    answer["label"] = order[i];
    answer["probability"] = static_cast<double>(row[order[i]]);
    answers.push_back(std::move(answer));
  }
  return answers;
}

}  // namespace

const CommandSpec predict_spec{
    "predict",
    "PATH IMAGES...",
    "Name what is on photographs: the likeliest classes of an artifact or a run, with their "
    "probabilities.\n\n"
    "PATH is a folder, or an artifact's .tar. IMAGES are image files (JPEG, PNG), and folders of them at "
    "any depth. A file that is no image gets a "
    "sentence, and "
    "the others go on.\n\n"
    "Exit status: 0 all images were read; 1 one was not, or nothing could be done.",
    options_of_predict,
    {},
    "    edge-bcs-run predict run photo.jpg\n"
    "    edge-bcs-run predict run new/ --top 1\n"
    "    edge-bcs-run predict out/vgg16 a.jpg b.png --json\n",
    2,
    1 << 20};

int predict(const Options& options) {
  const std::string path = options.arguments()[0];
  const auto top = static_cast<std::size_t>(options.whole("--top", 1).value_or(3));
  const bool as_json = options.has("--json");
  const MachineWishes machine = machine_of(options);
  note_signals();
  Network network(path, machine);
  if (const auto names = options.text("--class-names"))
    network.name(named(network.classes(), given_names(*names), network.info().classes));
  const Opening opening = network.opening({});
  const ImageShape shape = opening.shape;
  require(shape.channels == 1 || shape.channels == 3, "image files have 1 or 3 channels; the network takes ",
          shape.channels, ".");
  std::vector<Asked> asked = asked_for(std::span(options.arguments()).subspan(1));
  Value::List answers, failed;
  std::vector<std::uint8_t> pixels;
  std::vector<float> probabilities(std::size_t{network.info().attack_micro_batch} * network.info().classes);
  for (std::size_t first = 0; first < asked.size(); first += network.info().attack_micro_batch) {
    const std::span part = std::span(asked).subspan(
        first, std::min<std::size_t>(network.info().attack_micro_batch, asked.size() - first));
    check_signals();
    pixels.resize(shape.size() * part.size());
    std::size_t count = 0;
    for (Asked& one : part) {
      if (!one.why.empty()) continue;
      try {
        decode_file(one.file, opening, std::span(pixels).subspan(count * shape.size(), shape.size()));
        ++count;
      } catch (const BadImage& bad) {
        one.why = "the image " + plain(one.file) + " " + bad.what() + ".";
      }
    }
    edge_bcs_batch batch = sized<edge_bcs_batch>();
    batch.count = count;
    batch.bytes = pixels.data();
    if (count > 0) check(edge_bcs_predict(network.handle(), &batch, probabilities.data()));
    const float* row = probabilities.data();
    for (const Asked& one : part) {
      Value answer;
      answer["image"] = one.file;
      if (!one.why.empty()) {
        answer["why"] = one.why;
        say(one.why);
        failed.push_back(std::move(answer));
        continue;
      }
      const Value::List named = named_answers(network, {row, network.info().classes}, top);
      row += network.info().classes;
      answer["classes"] = named;
      if (as_json) {
        answers.push_back(std::move(answer));
        continue;
      }
      std::string line = plain(one.file) + ": ";
      for (const Value& each : named)
        line += (&each == named.data() ? "" : ", ") + plain(each.find("name")->text()) + " " +
                percent(each.find("probability")->number());
      print(line + "\n");
    }
  }
  const int status = failed.empty() ? 0 : 1;
  if (as_json) {
    Value result;
    result["path"] = path;
    result["images"] = std::move(answers);
    result["failed"] = std::move(failed);
    result["peak_bytes"] = network.info().arena_bytes;
    print(result.dump(1) + "\n");
  }
  return status;
}

}  // namespace edge_bcs::app
