package trace

import (
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf/btf"
)

// reasons are the running kernel's words for why a packet died and why a connection
// was refused. They are read from the kernel's own description of its types: numbers
// differ from release to release.
type reasons struct{ drop, reset map[uint32]string }

func readReasons(kernel *btf.Spec) (r reasons, err error) {
	if r.drop, err = words(kernel, "skb_drop_reason", "SKB_DROP_REASON_", "SKB_"); err != nil {
		return r, err
	}
	r.reset, err = words(kernel, "sk_rst_reason", "SK_RST_REASON_")
	return r, err
}

// words are the values of an enum without their prefix; none where there is no such
// enum.
func words(kernel *btf.Spec, enum string, prefixes ...string) (map[uint32]string, error) {
	named := map[uint32]string{}
	var is *btf.Enum
	if err := kernel.TypeByName(enum, &is); errors.Is(err, btf.ErrNotFound) {
		return named, nil
	} else if err != nil {
		return nil, fmt.Errorf("read enum %s of the kernel: %w", enum, err)
	}
	for _, value := range is.Values {
		word := value.Name
		for _, prefix := range prefixes {
			if short, ok := strings.CutPrefix(word, prefix); ok {
				word = short
				break
			}
		}
		named[uint32(value.Value)] = word
	}
	return named, nil
}

func (r reasons) word(from map[uint32]string, number uint32) string {
	if len(from) == 0 {
		return ""
	}
	if word, ok := from[number]; ok {
		return word
	}
	return fmt.Sprintf("REASON_%#x", number) // of a module, whose enum is its own
}
