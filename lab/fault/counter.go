package fault

import (
	"os"
	"strconv"
	"strings"
)

// counterIn reads a counter of a file like /proc/net/snmp: a line of names, and one of
// values.
func counterIn(file, group, name string) (uint64, bool) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	var names []string
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] != group+":" {
			continue
		}
		if names == nil {
			names = words
			continue
		}
		for i, n := range names {
			if n == name && i < len(words) {
				v, err := strconv.ParseUint(words[i], 10, 64)
				return v, err == nil
			}
		}
	}
	return 0, false
}
