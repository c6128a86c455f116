// A library that uses the dispatch key of adapted weights before lora does.
#pragma once

namespace other_owner {

/// Keeps the library linked: its registration runs when it is loaded.
[[gnu::visibility("default")]] bool is_loaded();

}  // namespace other_owner
