package sysctl

import (
	"bufio"
	"os"
	"path/filepath"
	"strings"
)

// folders of sysctl.d(5), and the one file that is older than they are.
var folders = []string{"etc/sysctl.d/*.conf", "run/sysctl.d/*.conf", "usr/local/lib/sysctl.d/*.conf", "usr/lib/sysctl.d/*.conf", "etc/sysctl.conf"}

// node is the first process's root folder: from a container with the node's
// processes that of the node.
const node = "/proc/1/root"

// Line is what a file says of a setting.
type Line struct {
	File string
	// Value has one space between several numbers, as Tree.Read's.
	Value string
}

// Files are those of sysctl.d(5) that set a setting when the machine starts, and
// whenever somebody runs `sysctl --system`. Files that cannot be seen from here are
// not among them.
func Files(name string) (files []string) {
	for _, l := range Lines(name) {
		files = append(files, l.File)
	}
	return files
}

// Lines is Files with what they say; of each file the last line counts.
func Lines(name string) []Line {
	if _, err := os.Stat(filepath.Join(node, "etc")); err == nil {
		return linesBelow(node, name)
	}
	return linesBelow("/", name)
}

func linesBelow(root, name string) (found []Line) {
	for _, folder := range folders {
		paths, _ := filepath.Glob(filepath.Join(root, folder)) // the patterns are not malformed
		for _, path := range paths {
			if value, is := sets(path, name); is {
				found = append(found, Line{"/" + strings.TrimPrefix(strings.TrimPrefix(path, root), "/"), value})
			}
		}
	}
	return found
}

// sets says whether a file has a line "name = value", and which value; its name may have
// slashes for dots, a dash before it, and wildcards.
func sets(path, name string) (value string, is bool) {
	all, _ := Assignments(path) // a file that is not there says nothing
	for _, a := range all {
		if fits, err := filepath.Match(a.Pattern, name); err == nil && fits {
			value, is = a.Value, true
		}
	}
	return value, is
}

// Assignment is a line "name = value" of a file in the form of sysctl.d(5).
type Assignment struct {
	// Pattern is the name with dots, which may have wildcards; Value is as a Line's.
	Pattern, Value string
}

// Assignments are those of a file, in their order. Other lines count as comments.
func Assignments(path string) (all []Assignment, err error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		key, text, assigned := strings.Cut(strings.TrimSpace(lines.Text()), "=")
		if !assigned || strings.HasPrefix(key, "#") || strings.HasPrefix(key, ";") {
			continue
		}
		pattern := strings.ReplaceAll(strings.TrimSpace(strings.TrimPrefix(key, "-")), "/", ".")
		all = append(all, Assignment{pattern, strings.Join(strings.Fields(text), " ")})
	}
	return all, lines.Err()
}
