package bpfmap

import (
	"fmt"

	"github.com/cilium/ebpf"
)

// Counts reads a per-CPU array of counters: the sum of all CPUs for each of the words,
// which are in the array's order (Words).
func Counts(m *ebpf.Map, words []string) (map[string]uint64, error) {
	counts := make(map[string]uint64, len(words))
	var perCPU []uint64
	for i, word := range words {
		if err := m.Lookup(uint32(i), &perCPU); err != nil {
			return nil, fmt.Errorf("read counter %s: %w", word, err)
		}
		for _, n := range perCPU {
			counts[word] += n
		}
	}
	return counts, nil
}
