// Times an ONNX model with onnxruntime's C API on a target without Python, and prints a row of CSV for each run.
//
// Build with a C++17 compiler and a release of onnxruntime for the target, which contains its headers and its library:
//
//   g++ -O2 -std=c++17 runner.cpp -I onnxruntime/include -L onnxruntime/lib -lonnxruntime -o runner
//
// Run, as often as there are models, and copy the output back:
//
//   ./runner model.onnx --shape image:1,3,224,224 --runs 100 --threads 1 > times.csv
//   ./runner small.onnx --shape image:1,3,224,224 --runs 100 --threads 1 >> times.csv
//   cpd-onnx bench --from times.csv
//
// --provider NAME and --option KEY=VALUE choose an execution provider by the names of onnxruntime's documentation (XNNPACK,
// QNN, SNPE, OpenVINO, CoreML ...). Sizes that the model leaves open are given by --shape; an open batch size is 1 by default.
// Floats are pseudo-random, other inputs zero.

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

const OrtApi* api = nullptr;

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "error: %s\n", message.c_str());
  std::exit(1);
}

void check(OrtStatus* status) {
  if (status != nullptr) fail(api->GetErrorMessage(status));
}

struct Request {
  std::string model, provider;
  std::map<std::string, std::vector<int64_t>> shapes;
  std::vector<std::string> keys, values;
  long runs = 100, warmup = 3, threads = 1;
};

struct Input {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<uint64_t> memory;  // of 8 bytes, so that every element type is aligned
  OrtValue* value = nullptr;
};

long number(const std::string& flag, const char* text, long least) {
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (end == text || *end != '\0' || value < least || value > 1000000000) {
    fail(flag + " " + text + " is not a whole number of at least " + std::to_string(least));
  }
  return value;
}

void add_shape(Request& request, const std::string& text) {
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0) fail("--shape " + text + " is not NAME:SIZE,SIZE,...");
  std::vector<int64_t>& shape = request.shapes[text.substr(0, colon)];
  shape.clear();
  for (size_t at = colon + 1; at <= text.size();) {
    const size_t comma = std::min(text.find(',', at), text.size());
    shape.push_back(number("--shape", text.substr(at, comma - at).c_str(), 1));
    at = comma + 1;
  }
}

void add_option(Request& request, const std::string& text) {
  const size_t sign = text.find('=');
  if (sign == std::string::npos || sign == 0) fail("--option " + text + " is not KEY=VALUE");
  request.keys.push_back(text.substr(0, sign));
  request.values.push_back(text.substr(sign + 1));
}

Request parse(int count, char** given) {
  Request request;
  for (int i = 1; i < count; ++i) {
    const std::string flag = given[i];
    if (flag.rfind("--", 0) != 0) {
      if (!request.model.empty()) fail("more than one model: " + flag);
      request.model = flag;
      continue;
    }
    if (i + 1 == count) fail(flag + " needs a value");
    const char* value = given[++i];
    if (flag == "--shape") add_shape(request, value);
    else if (flag == "--option") add_option(request, value);
    else if (flag == "--provider") request.provider = value;
    else if (flag == "--runs") request.runs = number(flag, value, 1);
    else if (flag == "--warmup") request.warmup = number(flag, value, 0);
    else if (flag == "--threads") request.threads = number(flag, value, 0);
    else fail("unknown option " + flag);
  }
  if (request.model.empty()) {
    fail("usage: runner MODEL [--shape NAME:SIZE,...] [--runs N] [--warmup N] [--threads N] [--provider NAME]"
         " [--option KEY=VALUE]");
  }
  return request;
}

OrtSession* open(const Request& request, OrtEnv* env) {
  OrtSessionOptions* options = nullptr;
  check(api->CreateSessionOptions(&options));
  check(api->SetIntraOpNumThreads(options, static_cast<int>(request.threads)));
  if (!request.provider.empty()) {
    std::vector<const char*> keys, values;
    for (const std::string& key : request.keys) keys.push_back(key.c_str());
    for (const std::string& value : request.values) values.push_back(value.c_str());
    check(api->SessionOptionsAppendExecutionProvider(options, request.provider.c_str(), keys.data(), values.data(),
                                                     keys.size()));
  }
  OrtSession* session = nullptr;
#ifdef _WIN32
  const std::wstring path(request.model.begin(), request.model.end());
#else
  const std::string& path = request.model;
#endif
  check(api->CreateSession(env, path.c_str(), options, &session));
  api->ReleaseSessionOptions(options);
  return session;
}

size_t bytes_of(ONNXTensorElementDataType type, const std::string& name) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64:
      return 8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32:
      return 4;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16:
      return 2;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL:
      return 1;
    default:
      fail("input " + name + " has elements of a type that the runner does not fill");
  }
}

std::vector<int64_t> shape_of(const Request& request, const std::string& name, std::vector<int64_t> shape) {
  const auto given = request.shapes.find(name);
  if (given != request.shapes.end()) return given->second;
  if (!shape.empty() && shape[0] < 1) shape[0] = 1;
  for (const int64_t size : shape) {
    if (size < 1) fail("input " + name + " leaves a size open: give all of them with --shape " + name + ":SIZE,...");
  }
  return shape;
}

void fill(Input& input, ONNXTensorElementDataType type, const OrtMemoryInfo* memory) {
  size_t count = 1;
  for (const int64_t size : input.shape) count *= static_cast<size_t>(size);
  const size_t bytes = count * bytes_of(type, input.name);
  input.memory.assign(bytes / 8 + 1, 0);
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    float* values = reinterpret_cast<float*>(input.memory.data());
    uint32_t state = 1;
    for (size_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;  // Numerical Recipes, chapter 7.1
      values[i] = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    }
  }
  check(api->CreateTensorWithDataAsOrtValue(memory, input.memory.data(), bytes, input.shape.data(), input.shape.size(),
                                            type, &input.value));
}

std::vector<Input> inputs_of(const Request& request, OrtSession* session, OrtAllocator* allocator) {
  OrtMemoryInfo* memory = nullptr;
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  size_t count = 0;
  check(api->SessionGetInputCount(session, &count));
  std::vector<Input> inputs(count);
  for (size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    check(api->SessionGetInputName(session, i, allocator, &name));
    inputs[i].name = name;
    check(api->AllocatorFree(allocator, name));
    OrtTypeInfo* info = nullptr;
    check(api->SessionGetInputTypeInfo(session, i, &info));
    const OrtTensorTypeAndShapeInfo* tensor = nullptr;
    check(api->CastTypeInfoToTensorInfo(info, &tensor));
    if (tensor == nullptr) fail("input " + inputs[i].name + " is not a tensor");
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    check(api->GetTensorElementType(tensor, &type));
    size_t rank = 0;
    check(api->GetDimensionsCount(tensor, &rank));
    std::vector<int64_t> shape(rank);
    check(api->GetDimensions(tensor, shape.data(), rank));
    api->ReleaseTypeInfo(info);
    inputs[i].shape = shape_of(request, inputs[i].name, shape);
    fill(inputs[i], type, memory);
  }
  for (const auto& given : request.shapes) {
    bool is_input = false;
    for (const Input& input : inputs) is_input = is_input || input.name == given.first;
    if (!is_input) fail("the model has no input " + given.first);
  }
  api->ReleaseMemoryInfo(memory);
  return inputs;
}

std::vector<std::string> outputs_of(OrtSession* session, OrtAllocator* allocator) {
  size_t count = 0;
  check(api->SessionGetOutputCount(session, &count));
  std::vector<std::string> names;
  for (size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    check(api->SessionGetOutputName(session, i, allocator, &name));
    names.emplace_back(name);
    check(api->AllocatorFree(allocator, name));
  }
  return names;
}

std::string cell(const std::string& text) {
  if (text.find_first_of(",\"\n\r") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char letter : text) quoted += letter == '"' ? "\"\"" : std::string(1, letter);
  return quoted + "\"";
}

double run(OrtSession* session, const std::vector<Input>& inputs, const std::vector<std::string>& outputs) {
  std::vector<const char*> read, made;
  std::vector<const OrtValue*> fed;
  for (const Input& input : inputs) {
    read.push_back(input.name.c_str());
    fed.push_back(input.value);
  }
  for (const std::string& name : outputs) made.push_back(name.c_str());
  std::vector<OrtValue*> found(outputs.size(), nullptr);
  const auto start = std::chrono::steady_clock::now();
  check(api->Run(session, nullptr, read.data(), fed.data(), fed.size(), made.data(), made.size(), found.data()));
  const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
  for (OrtValue* value : found) api->ReleaseValue(value);
  return taken.count();
}

}  // namespace

int main(int count, char** given) {
  api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (api == nullptr) fail("the library is older than the header that the runner was built with");
  const Request request = parse(count, given);
  OrtEnv* env = nullptr;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "runner", &env));
  OrtSession* session = open(request, env);
  OrtAllocator* allocator = nullptr;
  check(api->GetAllocatorWithDefaultOptions(&allocator));
  std::vector<Input> inputs = inputs_of(request, session, allocator);
  const std::vector<std::string> outputs = outputs_of(session, allocator);

  const size_t slash = request.model.find_last_of("/\\");
  const std::string name = request.model.substr(slash == std::string::npos ? 0 : slash + 1);
  const long long batch = inputs.empty() || inputs[0].shape.empty() ? 1 : inputs[0].shape[0];
  const std::string provider = request.provider.empty() ? "CPU" : request.provider;
  for (long i = 0; i < request.warmup; ++i) run(session, inputs, outputs);
  std::printf("model,batch,threads,provider,warmup,run,ms\n");
  for (long i = 0; i < request.runs; ++i) {
    const double ms = run(session, inputs, outputs);
    std::printf("%s,%lld,%ld,%s,%ld,%ld,%.6f\n", cell(name).c_str(), batch, request.threads, cell(provider).c_str(),
                request.warmup, i + 1, ms);
  }
  for (Input& input : inputs) api->ReleaseValue(input.value);
  api->ReleaseSession(session);
  api->ReleaseEnv(env);
  return 0;
}
