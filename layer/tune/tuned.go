package tune

import (
	"bufio"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/millrace/millrace/kernel/netns"
)

// tunedFolders are where profiles of tuned are, the first that has one counts
// (https://tuned-project.org, tuned.conf(5)).
var tunedFolders = []string{"etc/tuned/profiles", "etc/tuned", "usr/lib/tuned/profiles", "usr/lib/tuned"}

// tuned are the settings that a tuned has in force that runs here, as files has those of
// sysctl.d(5): it sets them when it starts, and whenever its profile changes. OpenShift's
// Node Tuning Operator runs one.
func tuned() map[string][][2]string {
	processes, err := netns.Processes()
	if err != nil {
		return nil
	}
	for _, folder := range processes {
		comm, _ := os.ReadFile(filepath.Join(folder, "comm"))
		if name := strings.TrimSpace(string(comm)); name == "tuned" || name == "openshift-tuned" {
			return tunedBelow(filepath.Join(folder, "root"))
		}
	}
	return nil
}

// tunedBelow reads the profiles that are in force, and those that they include.
func tunedBelow(root string) map[string][][2]string {
	all := map[string][][2]string{}
	active, _ := os.ReadFile(filepath.Join(root, "etc/tuned/active_profile"))
	todo := strings.Fields(string(active))
	for done := 0; done < len(todo) && done < 100; done++ { // a profile may include itself
		for _, folder := range tunedFolders {
			name := "/" + filepath.Join(folder, filepath.Base(todo[done]), "tuned.conf")
			file, err := os.Open(filepath.Join(root, name))
			if err != nil {
				continue
			}
			include := readTuned(file, func(setting, value string) {
				all[setting] = append(all[setting], [2]string{name + " of tuned", value})
			})
			file.Close()
			todo = append(todo, slices.DeleteFunc(include, func(p string) bool { return slices.Contains(todo, p) })...)
			break
		}
	}
	return all
}

// readTuned calls f with the settings of a profile that are set to a value; ">" before it
// would only raise them.
func readTuned(file *os.File, f func(setting, value string)) (include []string) {
	section := ""
	for lines := bufio.NewScanner(file); lines.Scan(); {
		line := strings.TrimSpace(lines.Text())
		if strings.HasPrefix(line, "[") {
			section = line
			continue
		}
		key, value, assigned := strings.Cut(line, "=")
		key, value = strings.TrimSpace(key), strings.Join(strings.Fields(value), " ")
		switch {
		case !assigned || strings.HasPrefix(line, "#"):
		case section == "[main]" && key == "include":
			include = append(include, strings.FieldsFunc(value, func(r rune) bool { return r == ',' || r == ' ' })...)
		case section == "[sysctl]" && !strings.HasPrefix(value, ">"):
			f(strings.ReplaceAll(key, "/", "."), strings.Trim(value, `"`))
		}
	}
	return include
}
