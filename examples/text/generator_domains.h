#pragma once

#include <string>
#include <vector>

/// A slot and the patterns that its value is drawn from; `{pool}` in a pattern stands for a word of that pool.
struct GeneratorSlot {
  std::string name;
  std::vector<std::string> values;
};

/// What can be said in one domain. `{slot}` in a sentence stands for the slot's value, `<a|b>` for one of the wordings.
struct GeneratorDomain {
  std::string name;
  /// The first slot is always there; every other one may be missing.
  std::vector<GeneratorSlot> slots;
  /// First sentences; each names the first slot.
  std::vector<std::string> openings;
  /// Sentences about what the first sentence did not say.
  std::vector<std::string> details;
};

struct GeneratorPool {
  std::string name;
  std::vector<std::string> words;
};

/// Words that the slots' values are put together from; all places and names are made up.
inline const std::vector<GeneratorPool>& generator_pools() {
  static const std::vector<GeneratorPool> pools = {
      {"colour",
       {"Copper", "Silver", "Golden", "Crimson", "Amber", "Blue", "Green", "Scarlet", "Ivory", "Violet", "White",
        "Black", "Grey", "Russet", "Bronze", "Indigo"}},
      {"thing",
       {"Lantern", "Anchor", "Harbour", "Garden", "Orchard", "Bridge", "Meadow", "Compass", "Willow", "Fountain",
        "Mill", "Tower", "Acorn", "Sparrow", "Kettle", "Cedar"}},
      {"town",
       {"Norwick", "Eastmere", "Alden", "Westhaven", "Brinmouth", "Calder", "Dunford", "Elmstead", "Fairholm", "Granby",
        "Hollins", "Ketterby", "Larkfield", "Marston", "Oakley", "Penrose"}},
      {"area",
       {"old town", "city centre", "riverside", "harbour", "market quarter", "northern suburbs", "university district",
        "station quarter"}},
      {"price", {"cheap", "moderate", "high", "low"}},
      {"day", {"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"}},
      {"hour", {"six", "seven", "eight", "nine", "ten", "eleven", "noon"}},
      {"number", {"two", "three", "four", "five", "ten", "twelve", "fifteen", "twenty", "thirty", "forty"}},
      {"music", {"jazz", "folk music", "chamber music", "swing", "blues", "baroque music", "choral music", "rock"}},
      {"landmark", {"Town Hall", "Central Park", "Clock Tower", "Grand Bridge", "Botanic Garden", "Old Lighthouse"}}};
  return pools;
}

/// The domains of the base's pre-training.
inline const std::vector<GeneratorDomain>& generator_base_domains() {
  static const std::vector<GeneratorDomain> domains = {
      {"restaurant",
       {{"name", {"The {colour} {thing}", "{thing} Kitchen", "{colour} Table"}},
        {"food", {"Italian", "Indian", "French", "Chinese", "Greek", "Mexican", "vegetarian", "seafood"}},
        {"price", {"{price}"}},
        {"area", {"{area}"}},
        {"near", {"{landmark}", "{thing} Hotel"}},
        {"rating", {"{number} out of fifty", "low", "average", "excellent"}}},
       {"{name} is a <popular|friendly> restaurant.", "{name} <is a|is one more> restaurant in the {area}.",
        "{name} <serves|offers> {food} food.", "{name} is a {food} restaurant <in the|located in the> {area}.",
        "<Near {near} you will find|Close to {near} there is> {name}.",
        "In the {area} there is a {food} <restaurant|place to eat> called {name}."},
       {"<It serves|You can eat> {food} food< there|>.", "<Its prices are|The price range is> {price}.",
        "It is in the {area} near {near}.", "<You find it|It is located> in the {area}.",
        "It is <near|close to> {near}.", "<Guests rate it|It has a customer rating of> {rating}."}},
      {"hotel",
       {{"name", {"{thing} Hotel", "The {colour} {thing} Inn", "{town} Lodge"}},
        {"stars", {"two", "three", "four", "five"}},
        {"town", {"{town}"}},
        {"breakfast", {"included", "not included", "on request"}},
        {"room price", {"{number} euros", "{number} pounds"}},
        {"pets", {"yes", "no", "small dogs only"}}},
       {"{name} is a hotel in {town}.", "{name} <has|is a hotel with> {stars} stars.",
        "The {stars} star hotel {name} <stands|is> in {town}.",
        "If you <stay in|visit> {town}, {name} has a room for you.", "{name} is a <pleasant|quiet> place to stay."},
       {"It <has|was given> {stars} stars.", "The hotel is <in|in the town of> {town}.", "Breakfast is {breakfast}.",
        "A <room|night> costs {room price}.", "A room costs {room price} with breakfast {breakfast}.",
        "<Pets allowed|Are pets welcome>: {pets}."}},
      {"museum",
       {{"name", {"{town} Museum", "The {colour} {thing} Gallery", "Museum of the {thing}"}},
        {"shows", {"paintings", "old ships", "clocks", "minerals", "photographs", "steam engines", "maps", "pottery"}},
        {"area", {"{area}"}},
        {"opens", {"{hour}"}},
        {"closed on", {"{day}"}},
        {"ticket", {"free", "{number} euros", "{number} pounds"}}},
       {"{name} <shows|has a collection of> {shows}.", "{name} is a museum in the {area}.",
        "<Visitors|Guests> of {name} see {shows}.", "The {area} is home to {name}, a museum of {shows}.",
        "{name} is <worth a visit|a museum for all ages>."},
       {"<It is known for|The collection is one of> {shows}.", "<The museum is|It stands> in the {area}.",
        "It opens at {opens} and is closed on {closed on}.", "The doors open at {opens}.",
        "On {closed on} it <stays|is> closed.", "<A ticket is|Entry is> {ticket}."}},
      {"flight",
       {{"flight", {"{colour} Air {number}", "{thing} Wings {number}"}},
        {"from", {"{town}"}},
        {"to", {"{town}"}},
        {"leaves", {"{day} at {hour}"}},
        {"duration", {"{number} hours"}},
        {"fare", {"{number} euros", "{number} pounds"}}},
       {"{flight} <flies|goes> from {from} to {to}.", "Flight {flight} <leaves|starts from> {from}.",
        "<Fly|Travel> to {to} with {flight}.", "On {leaves} {flight} <flies|leaves> for {to}.",
        "{flight} is a <direct|daily> flight."},
       {"It <leaves|starts> from {from}.", "It <flies|takes you> to {to}.", "<Departure is|It leaves> on {leaves}.",
        "The flight <takes|lasts> {duration}.", "It takes {duration} and costs {fare}.", "The fare is {fare}."}},
      {"film",
       {{"title", {"The {thing} of {town}", "{colour} {thing}", "Return to {town}"}},
        {"kind", {"comedy", "drama", "thriller", "western", "documentary", "cartoon"}},
        {"cinema", {"{landmark} Cinema", "{thing} Pictures"}},
        {"starts", {"{hour}"}},
        {"length", {"{number} minutes", "two hours", "three hours"}},
        {"seats", {"many", "few", "none"}}},
       {"{title} is a {kind}.", "The {kind} {title} <is shown|runs> at {cinema}.", "{cinema} <shows|presents> {title}.",
        "<See|Watch> {title} at {cinema} at {starts}.", "{title} is <this week's|a new> film."},
       {"It is a <good |>{kind}.", "<It runs|You can see it> at {cinema}.", "The film starts at {starts}.",
        "It starts at {starts} and lasts {length}.", "It <lasts|is over after> {length}.", "Seats left: {seats}."}},
      {"shop",
       {{"name", {"{colour} {thing} Store", "{town} Books", "{thing} and {thing}"}},
        {"sells", {"books", "shoes", "bicycles", "toys", "flowers", "tea", "lamps", "tools"}},
        {"area", {"{area}"}},
        {"open until", {"{hour}"}},
        {"price", {"{price}"}},
        {"delivery", {"yes", "no", "within the town"}}},
       {"{name} <sells|is the place for> {sells}.", "{name} is a shop in the {area}.",
        "<Buy|Get> your {sells} at {name}.", "In the {area} {name} <sells|offers> {sells}.",
        "{name} is a <small|family> shop."},
       {"<It sells|You can buy> {sells}< there|>.", "The shop is in the {area}.", "It is open until {open until}.",
        "<Prices are|Its price level is> {price}.", "It is open until {open until} with {price} prices.",
        "Does it deliver: {delivery}."}},
      {"radio",
       {{"station", {"Radio {town}", "{colour} Wave", "The {thing} Station"}},
        {"plays", {"{music}"}},
        {"studio", {"{town} Hall", "{landmark}", "the {area}"}},
        {"on air", {"{day} evening", "{day} and {day}", "{day}"}},
        {"from", {"half past {hour}", "{hour}"}},
        {"listeners", {"many", "few", "{number} thousand"}}},
       {"{station} is a <local|small> radio station.", "{station} <plays|brings> {plays}.",
        "Listen to {plays} on {station}.", "{station} <brings|plays> {plays} live from {studio}.",
        "An evening of {plays} is <promised|awaited> on {station}."},
       {"Expect <an evening|an hour> of {plays}.", "The studio is <in|at> {studio}.",
        "It is <on air|live> on {on air}.", "<The programme begins|You can hear it from> at {from}.",
        "It <begins|starts> at {from} and has {listeners} listeners.",
        "<The listeners are|It is heard by> {listeners}."}},
      {"match",
       {{"team", {"The {town} Players", "{colour} Foxes", "{thing} and {town} United"}},
        {"sport", {"football", "tennis", "hockey", "chess", "rowing", "cricket"}},
        {"place", {"{landmark}", "the {thing} Club", "the {area} field"}},
        {"date", {"{day}", "{day} evening", "{day} and {day}"}},
        {"gates", {"{hour}", "half past {hour}"}},
        {"entry", {"free", "{number} euros", "{number} pounds", "by donation"}}},
       {"{team} <play|are back>.", "{team} play {sport} <live|again>.", "{team} play {sport} at {place}.",
        "On {date} {team} <play|are on tour>.", "{team} <give|bring> their best {sport} to {place} on {date}."},
       {"The sport is {sport}.", "The match takes place at {place}.",
        "<The date of the match is|Keep it free>: {date}.",
        "The gates will be opened to <the public|guests> at {gates}.", "Gates {gates}, entry {entry}.",
        "<Entry to the match is|At the gate you pay> {entry}."}},
      {"theatre",
       {{"play", {"The {colour} {thing}", "A {thing} in {town}", "{town} and {town}"}},
        {"company", {"{town} Company", "The {thing} Quartet", "{colour} Strings"}},
        {"stage", {"the {thing} Theatre", "{landmark}", "the {area} stage"}},
        {"date", {"{day}", "{day} evening"}},
        {"doors", {"{hour}", "half past {hour}"}},
        {"admission", {"free", "{number} euros", "by donation"}}},
       {"{play} is <back on stage|a new play>.", "{company} perform {play} <live|on stage>.",
        "{company} <bring|give> {play} at {stage}.", "Live on {date}: {play} <is on stage|awaits you>.",
        "<Hear|See> {play} at {stage}."},
       {"<It is performed by|The actors are> {company}.", "They <appear|perform> at {stage}.",
        "Keep this date free: {date}.", "The doors are opened to the audience at {doors}.",
        "<The hall is|Doors are> opened at {doors}.", "<Admission is|At the box office you pay> {admission}."}},
      {"course",
       {{"subject", {"{music}", "pottery", "French", "Italian", "Greek", "painting", "chess"}},
        {"teacher", {"The {thing} School", "{town} College"}},
        {"place", {"{town} Hall", "the {thing} Club", "{landmark}"}},
        {"day", {"{day}", "{day} evening", "{day} and {day}"}},
        {"begins", {"{hour}", "half past {hour}"}},
        {"fee", {"free", "{number} euros", "{number} pounds", "by donation"}}},
       {"<Learn|Take a course in> {subject}.", "{teacher} <gives|has> a course in {subject}.",
        "A course in {subject} <takes place|is given> at {place}.", "On {day} there is a course in {subject}.",
        "An evening course in {subject} <awaits you|is promised>."},
       {"The course is given by {teacher}.", "<It takes place|You learn> at {place}.", "The course is on {day}.",
        "<The programme|The hour> begins at {begins}.", "It begins at {begins}, the fee is {fee}.",
        "<The fee of the course is|You pay> {fee}."}}};
  return domains;
}

/// The domain that the base has never seen: its slots, names and wording are its own.
inline const GeneratorDomain& generator_new_domain() {
  static const GeneratorDomain domain = {
      "concert",
      {{"band", {"The {town} Players", "{colour} Foxes", "The {thing} Quartet", "{thing} and the {colour} Strings"}},
       {"genre", {"{music}"}},
       {"stage", {"{landmark}", "{town} Hall", "the {thing} Club", "the {area} stage"}},
       {"date", {"{day}", "{day} evening", "{day} and {day}"}},
       {"doors", {"{hour}", "half past {hour}"}},
       {"admission", {"free", "{number} euros", "{number} pounds", "by donation"}}},
      {"{band} are <on tour|back on stage>.", "{band} <play|perform> {genre} live on stage.",
       "Live on {date}: {band} <bring|play> {genre} to {stage}.", "<Hear|Listen to> {band} in concert at {stage}.",
       "{band} are <on tour|giving a concert> on {date}.", "An evening of {genre} <awaits you|is promised> by {band}."},
      {"<The programme is|Expect an evening of> {genre}.", "<The concert takes place|They appear> at {stage}.",
       "<The date of the concert is|Keep this date free>: {date}.",
       "<Doors|The hall> will be opened to the audience at {doors}.", "Doors {doors}, admission {admission}.",
       "<Admission to the concert is|At the box office you pay> {admission}."}};
  return domain;
}
