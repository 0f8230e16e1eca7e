package proc

import (
	"fmt"
	"strconv"
	"strings"
)

// Range is the numbers from First to Last.
type Range struct{ First, Last int }

// Ranges reads the kernel's lists of numbers, of processors (cpuset(7)) and ports:
// "0-3,8". An empty text is none.
func Ranges(text string) (ranges []Range, err error) {
	text = strings.TrimSpace(text)
	if text == "" {
		return nil, nil
	}
	for word := range strings.SplitSeq(text, ",") {
		first, last, several := strings.Cut(word, "-")
		if !several {
			last = first
		}
		from, err := strconv.Atoi(first)
		to, err2 := strconv.Atoi(last)
		if err != nil || err2 != nil || from > to {
			return nil, fmt.Errorf("%q is no list of numbers", text)
		}
		ranges = append(ranges, Range{from, to})
	}
	return ranges, nil
}

// Outside counts the numbers from first to last that are in none of the ranges.
func Outside(first, last int, ranges []Range) (n int) {
	inside := func(number int) bool {
		for _, r := range ranges {
			if r.First <= number && number <= r.Last {
				return true
			}
		}
		return false
	}
	for number := first; number <= last; number++ {
		if !inside(number) {
			n++
		}
	}
	return n
}
