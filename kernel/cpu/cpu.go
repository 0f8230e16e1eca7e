// Package cpu counts the machine's processors.
//
// It reads one file of sysfs and writes nothing.
package cpu

import (
	"errors"
	"fmt"
	"os"

	"github.com/millrace/millrace/kernel/proc"
)

const list = "/sys/devices/system/cpu/online"

// Online is how many processors are in use: of the machine, whatever share of them
// this process may run on.
func Online() (int, error) {
	text, err := os.ReadFile(list)
	if err != nil {
		return 0, fmt.Errorf("count processors: %w", err)
	}
	n, err := count(string(text))
	if err != nil {
		return 0, fmt.Errorf("count processors in %s: %w", list, err)
	}
	return n, nil
}

func count(text string) (n int, err error) {
	ranges, err := proc.Ranges(text)
	for _, r := range ranges {
		n += r.Last - r.First + 1
	}
	if err == nil && n == 0 {
		err = errors.New("it names none")
	}
	return n, err
}
