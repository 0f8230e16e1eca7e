// Package cpu counts the machine's processors.
//
// It reads one file of sysfs and writes nothing.
package cpu

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// list is in the form of cpuset(7): "0-3,8".
const list = "/sys/devices/system/cpu/online"

// Online is how many processors are in use: of the machine, whatever share of them
// this process may run on.
func Online() (int, error) {
	text, err := os.ReadFile(list)
	if err != nil {
		return 0, fmt.Errorf("count processors: %w", err)
	}
	n, err := count(strings.TrimSpace(string(text)))
	if err != nil {
		return 0, fmt.Errorf("count processors in %s: %w", list, err)
	}
	return n, nil
}

func count(text string) (n int, err error) {
	for part := range strings.SplitSeq(text, ",") {
		from, to, several := strings.Cut(part, "-")
		if !several {
			to = from
		}
		first, err := strconv.Atoi(from)
		if err != nil {
			return 0, err
		}
		last, err := strconv.Atoi(to)
		if err != nil {
			return 0, err
		}
		n += last - first + 1
	}
	return n, nil
}
