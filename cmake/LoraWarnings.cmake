# The warnings of this project's own programs. LibTorch and the other libraries are system includes, out of their reach.
function(lora_warnings)
  foreach(target IN LISTS ARGN)
    target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror)
  endforeach()
endfunction()
