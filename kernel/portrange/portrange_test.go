package portrange

import "testing"

// The ports that are free are nobody else's.
func TestFreePortsAreNobodyElses(t *testing.T) {
	for _, row := range []struct {
		low, high    int
		first, count uint16
	}{
		{32768, 60999, 1024, 28976},
		{1024, 65535, 32768, 32768}, // there is none: those above the node ports
		{10000, 65535, 1024, 8976},
		{1024, 60999, 61000, 4536},
		{1024, 29999, 32768, 32768},
	} {
		if first, count := Free(row.low, row.high); first != row.first || count != row.count {
			t.Errorf("beside %d to %d: %d from %d on, want %d from %d on", row.low, row.high, count, first, row.count, row.first)
		}
	}
}

// What is read is a namespace's.
func TestLocalPorts(t *testing.T) {
	low, high, err := Local("")
	if err != nil || low < 1 || high < low || high > 65535 {
		t.Errorf("sockets are given %d to %d: %v", low, high, err)
	}
}
