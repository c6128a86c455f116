// A library that uses the dispatch key of adapted weights before lora does.
#pragma once

namespace other_owner {

/// What lora says beside this library.
[[gnu::visibility("default")]] const char* expected_error();

}  // namespace other_owner
