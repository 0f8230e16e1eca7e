package proc

import (
	"slices"
	"testing"
)

func TestRanges(t *testing.T) {
	for text, want := range map[string][]Range{
		"": nil, "\n": nil, "0\n": {{0, 0}}, "0-3,8": {{0, 3}, {8, 8}}, "8080,30000-32767\n": {{8080, 8080}, {30000, 32767}},
	} {
		if got, err := Ranges(text); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %v, %v; want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"0-", "a", "0,,1", "3-1", ","} {
		if got, err := Ranges(text); err == nil {
			t.Errorf("%q: %v and no error", text, got)
		}
	}
}

// Node ports are safe from the node's own sockets where the kernel gives others, or was
// told to leave them out.
func TestNodePortsThatSocketsAreGiven(t *testing.T) {
	for _, row := range []struct {
		low, high int
		reserved  string
		want      bool
	}{
		{32768, 60999, "\n", false},
		{1024, 65535, "\n", true},
		{1024, 65535, "8080,30000-32767\n", false},
		{1024, 65535, "30000-32000,32002-32767\n", true},
		{1024, 65535, "30000-32000,32001,32002-32767\n", false},
		{32000, 60999, "32000-32767", false},
	} {
		reserved, err := Ranges(row.reserved)
		if got := Outside(max(row.low, 30000), min(row.high, 32767), reserved) > 0; err != nil || got != row.want {
			t.Errorf("%d to %d without %q: %v, %v", row.low, row.high, row.reserved, got, err)
		}
	}
}
