# Sets `result` to the library's version, whose one home is include/lora/version.h of the project in `source`.
function(lora_read_version source result)
  file(STRINGS "${source}/include/lora/version.h" lines REGEX "^#define LORA_VERSION_(MAJOR|MINOR|PATCH) +[0-9]+")
  string(REGEX REPLACE "[^;0-9]*([0-9]+)" "\\1" parts "${lines}")
  list(JOIN parts "." version)
  set(${result} "${version}" PARENT_SCOPE)
endfunction()
